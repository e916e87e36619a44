"""Let every model of evaluate.models answer the test split, score the answers, write metrics.json and report.html."""

from geodistill.cli import main
from geodistill.config import Config


def evaluate_job(config: Config) -> None:
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.evaluate.metrics import summary_table
    from geodistill.evaluate.report import report_of_run

    scores = evaluate(config)
    page = report_of_run(config, scores)
    print(f"\n{summary_table(scores)}\n\nmetrics: {config.run}/metrics.json\nreport:  {page}")


if __name__ == "__main__":
    main("evaluate", evaluate_job)
