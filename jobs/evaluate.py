"""Let every model of evaluate.models answer the test split, score the answers, and write metrics.json and report.html."""

import sys

from geodistill.config import from_command_line

if __name__ == "__main__":
    config = from_command_line("evaluate")

    from geodistill.cluster import connect
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.evaluate.metrics import summary_table
    from geodistill.evaluate.report import report_of_run

    try:
        connect()
        scores = evaluate(config)
        page = report_of_run(config, scores)
    except ValueError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(f"\n{summary_table(scores)}\n\nmetrics: {config.run}/metrics.json\nreport:  {page}")
