"""Let every model of evaluate.models answer the test split, score the answers, write metrics.json and report.html.

With predictions=FILE.jsonl output=FILE.json: score those answers, run no model and start no Ray.
"""

from geodistill.cli import main
from geodistill.config import Config


def score_job(config: Config) -> None:
    from geodistill.evaluate.metrics import score_file, summary_table

    counter_clockwise = config.evaluate.angle_counter_clockwise
    scores, bad = score_file(config.predictions, config.output, counter_clockwise)
    print(summary_table(scores))
    for name, score in scores.items():
        for what, count in score["not_scored"].items():
            print(f"{name}: {count} {what} without a metric")
    if bad:
        print(f"set aside: {len(bad)}; the first: line {bad[0]['line']}, field {bad[0]['field'] or '-'}: {bad[0]['reason']}")
    print(f"\nfigures: {config.output}")


def evaluate_job(config: Config) -> None:
    if config.predictions:
        score_job(config)
        return
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.evaluate.metrics import summary_table
    from geodistill.evaluate.report import report_of_run

    scores = evaluate(config)
    page = report_of_run(config, scores)
    print(f"\n{summary_table(scores)}\n\nmetrics: {config.run}/metrics.json\nreport:  {page}")


if __name__ == "__main__":
    main("evaluate", evaluate_job, needs_ray=lambda config: not config.predictions)
