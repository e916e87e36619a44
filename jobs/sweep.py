"""Distil with other settings side by side (sweep.space), and leave the best model in run/sweep/best, ready to serve.

Data and teacher are those of the run. An interrupted sweep goes on with resume=true.
"""

from pathlib import Path

from geodistill.cli import main
from geodistill.config import Config


def sweep_job(config: Config) -> None:
    from geodistill.sweep import sweep, sweep_table

    found = sweep(config)
    folder = Path(config.run) / "sweep"
    (folder / "table.txt").write_text(sweep_table(found))
    print(f"\n{sweep_table(found)}\n\nfigures: {folder}/sweep.json, {folder}/sweep.png")


if __name__ == "__main__":
    main("sweep", sweep_job)
