"""Report again on answers that are there: the paper's tables, intervals and paired tests, as text and in report.html.

Reads RUN/evaluate/MODEL.jsonl of the models of evaluate.models; runs no model and starts no Ray.
"""

from geodistill.cli import main
from geodistill.config import Config


def report_job(config: Config) -> None:
    from geodistill.evaluate.metrics import score, summary_table
    from geodistill.evaluate.report import answers_of_run, comparisons, report_of_run

    answers = answers_of_run(config)
    scores = {name: score(found, config.evaluate.angle_counter_clockwise) for name, found in answers.items()}
    sections = comparisons(config, answers)
    for title, tables in sections.items():
        print(f"\n{title}\n{'=' * len(title)}\n\n" + "\n\n".join(table.text() for table in tables))
    page = report_of_run(config, scores, sections)
    print(f"\n{summary_table(scores)}\n\nreport: {page}")


if __name__ == "__main__":
    main("report", report_job, needs_ray=lambda config: False)
