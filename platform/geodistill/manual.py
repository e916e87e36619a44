"""What people read: the settings of each job (`--help`, docs/jobs, which `python -m geodistill.manual` writes), and what a run
folder holds (its README.md)."""

import ast
import json
import shlex
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from geodistill.config import keys

ROOT = Path(__file__).parents[2]
# keys, or groups of them, in the order of configs
PROMPT = ("system", "image_size")
STAGE = ("run", "seed", *PROMPT, "features", "checkpoints", "mlflow", "data.shards")
PREPARE = ("run", "seed", "system", "data", "teacher.model.init", "cluster.data_tasks")
FINETUNE = (*STAGE, "role", "teacher", "student", "cluster", "plan")
DISTILL = (*STAGE, "student.model", "teacher.model", "distill", "cluster", "plan")
EVALUATE = ("run", "seed", *PROMPT, "data.shards", "evaluate", "cluster.workers", "cluster.use_gpu", "cluster.precision",
            "cluster.cpus_per_worker", "cluster.threads_per_worker")  # fmt: skip
READS: dict[str, tuple[str, ...]] = {
    "prepare": PREPARE,
    "finetune": FINETUNE,
    "distill": DISTILL,
    "evaluate": (*EVALUATE, "predictions", "output"),
    "report": ("run", "data.shards", "evaluate"),
    "pipeline": (*PREPARE, *FINETUNE, *DISTILL, *EVALUATE),
    "sweep": (*DISTILL, "sweep", "resume"),
    "seeds": (*FINETUNE, *DISTILL, *EVALUATE),
    "ablation": (*DISTILL, *EVALUATE, "ablation"),
    "features": ("run", "features", "image_size", "data.shards", "teacher", "student", "distill", "cluster"),
    "plan": (*PROMPT, "data", "teacher", "student", "distill", "cluster", "plan"),
    "doctor": ("run", "checkpoints", "data.shards", "cluster.use_gpu", "sweep.port"),
    "predict": ("run", *PROMPT, "data.bands", "evaluate.angle_counter_clockwise", "cluster", "predict"),
    "export": ("run", "data.shards", "distill", "evaluate", "cluster", "export"),
    "towers": (*FINETUNE, *EVALUATE, "tower"),
    "pretrain": ("run", "seed", "teacher.model.vision", "tower"),
    "benchmark": ("",),
}


def keys_of(job: str) -> list[tuple[str, str, Any, str, str]]:
    """The keys of `config.keys` that a job reads, in the order of the file."""
    return [one for one in keys() if any(one[0] == name or not name or one[0].startswith(f"{name}.") for name in READS[job])]


def describe(job: str) -> str:
    """The text of `--help`: one line a key with its default, unit and meaning."""
    lines = []
    for name, kind, default, unit, meaning in keys_of(job):
        lines.append(f"  {name}: {kind} = {_shown(default)}\n      {meaning}{f' [{unit}]' if unit else ''}")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    shown = f"{default!r}" if not isinstance(default, str) or default else "(empty)"
    return shown if len(shown) < 40 else shown[:37] + "..."


def page(job: str) -> str:
    """The page of a job, as Markdown."""
    about = ast.get_docstring(ast.parse((ROOT / f"jobs/{job}.py").read_text())) or ""
    lines = [f"# jobs/{job}.py", "", about, "", "```", f"python jobs/{job}.py --config FILE [key=value ...]", "```", "",
             "Exit codes: 0 done; 1 data or training failed, with the reason; 2 wrong settings, before anything starts; 3 ended "
             "by SIGTERM, 130 by Ctrl-C: the same command goes on, a stage where it was, the trials of a sweep from their last "
             "checkpoints.", "",
             "| key | type | default | meaning |", "|---|---|---|---|"]  # fmt: skip
    for name, kind, default, unit, meaning in keys_of(job):
        cells = f"`{name}`", f"`{kind}`", f"`{_shown(default)}`", f"{meaning}{f' [{unit}]' if unit else ''}"
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


STAGE_FOLDER = (
    "`model/` (plain transformers loads it), `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `config.yaml`, `done.json`"
)
FOLDERS = {
    "data": "the prepared data: Parquet shards, `manifest.json`, `preview.html`, `rejected.parquet`: what was left out, why",
    "tower": "the vision tower that `pretrain.py` made",
    "teacher": f"the teacher: {STAGE_FOLDER} once it is finished",
    "baseline": "a student that learned without a teacher, in the same shape",
    "blind": "a student that never saw an image, for comparison",
    "distill": "the distilled student, in the same shape; `warm/`: the same after its warm start",
    "sweep": "`sweep.json`, `sweep.png`, `trials/`, and `best/model`",
    "evaluate": "what every model answered, one JSON a line",
    "metrics.json": "the figures of every model",
    "report.html": "the same to look at: tables, confusion matrix, samples with their boxes",
    "predict": "what was found in whole scenes, as GeoJSON for QGIS",
    "export": "models for others, each with a model card",
    "benchmark": "what `benchmark.py` measured",
    "jobs.jsonl": "the jobs that ran here: command, times [UTC], exit code, last words",
}


def record(run: str, job: str, arguments: list[str], begun: float, code: int, said: str) -> None:
    """Add a job that has ended to RUN/jobs.jsonl, and tell in RUN/README.md what the folder holds; nothing where there is no such
    folder. begun: seconds since 1970."""
    times = [datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") for at in (begun, datetime.now().timestamp())]
    row = {"job": job, "arguments": arguments, "begun": times[0], "ended": times[1], "exit": code, "said": said}
    from pyarrow.fs import FileSelector, FileType  # here: a wrong setting shall be told at once

    from geodistill.data.files import located, open_folder, read_lines, write_text

    with suppress(OSError, ValueError):  # a full disk, or a store that nobody reaches, is told by what needed it
        store, path = located(run)
        if store.get_file_info(path).type != FileType.Directory:
            return
        folder = open_folder(run)
        there = {found.base_name for found in folder.get_file_info(FileSelector(""))}
        jobs = [*read_lines(folder, "jobs.jsonl"), row]
        write_text(folder, "jobs.jsonl", "".join(json.dumps(one) + "\n" for one in jobs))
        lines = ["# A run of GeoDistill", "", "| here | what it is |", "|---|---|"]
        lines += [f"| `{name}` | {what} |" for name, what in FOLDERS.items() if name in {*there, "jobs.jsonl"}]
        command = f"python jobs/{job}.py {shlex.join(arguments)}"
        lines += ["", f"Last: `{command}`, from {times[0]} to {times[1]}, exit code {code}: {said}", "",
                  "Exit codes: 0 done; 1 data or training failed; 3 ended by SIGTERM, 130 by Ctrl-C. The same command "
                  "goes on where a job stopped.", ""]  # fmt: skip
        write_text(folder, "README.md", "\n".join(lines))


def main() -> None:
    """Write docs/jobs."""
    folder = ROOT / "docs/jobs"
    folder.mkdir(parents=True, exist_ok=True)
    for job in READS:
        (folder / f"{job}.md").write_text(page(job))


if __name__ == "__main__":
    main()
