"""Pages that are made from the code are those that are there, and what documents point to exists."""

import contextlib
import json
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest

from geodistill import manual
from geodistill.cli import main, settings
from geodistill.config import keys

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "infra/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("job", manual.READS)
def test_the_page_of_a_job_is_up_to_date(job):
    file = ROOT / f"docs/jobs/{job}.md"
    assert file.read_text() == manual.page(job), "run: python -m geodistill.manual"


def test_every_job_has_a_page_and_reads_what_is_there():
    jobs = {file.stem for file in (ROOT / "jobs").glob("*.py")} - {"convert"}  # which has arguments of its own
    assert jobs == manual.READS.keys()
    names = [name for name, *_ in keys()]
    for job, reads in manual.READS.items():
        for name in reads:
            assert any(not name or key == name or key.startswith(f"{name}.") for key in names), (job, name)
    read = {name for job in manual.READS if job != "benchmark" for name, *_ in manual.keys_of(job)}
    assert read == set(names), "keys that no job reads"


def test_help_is_about_the_job(capsys):
    with pytest.raises(SystemExit) as left:
        settings("predict", ["--help"])
    said = capsys.readouterr().out
    assert left.value.code == 0 and "predict.scenes: str" in said and "distill.loss.alpha" not in said


def test_a_run_folder_tells_what_it_holds_and_how_its_jobs_ended(tmp_path, monkeypatch, capsys):
    (tmp_path / "run/teacher").mkdir(parents=True)
    arguments = ["--config", str(ROOT / "configs/demo.yaml"), f"run={tmp_path}/run"]
    monkeypatch.setattr("sys.argv", ["jobs/finetune.py", *arguments])

    def fails(config):
        raise ValueError("the disk is gone")

    def breaks(config):
        raise KeyboardInterrupt

    main("finetune", lambda config: None, needs_ray=lambda config: False)
    with pytest.raises(SystemExit):
        main("finetune", fails, needs_ray=lambda config: False)
    assert "`teacher`" in (tmp_path / "run/README.md").read_text() and "`sweep`" not in (tmp_path / "run/README.md").read_text()
    assert "exit code 1: the disk is gone" in (tmp_path / "run/README.md").read_text()
    with pytest.raises(SystemExit, match="130"):
        main("finetune", breaks, needs_ray=lambda config: False)
    rows = [json.loads(line) for line in (tmp_path / "run/jobs.jsonl").read_text().splitlines()]
    goes_on = "stopped by Ctrl-C; the same command goes on"
    assert [(row["exit"], row["said"]) for row in rows] == [(0, "done"), (1, "the disk is gone"), (130, goes_on)]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="3"):
        main("finetune", lambda config: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(10)), needs_ray=lambda config: False)
    assert "exit code 3: stopped by SIGTERM" in (tmp_path / "run/README.md").read_text()
    assert signal.getsignal(signal.SIGTERM) == before

    def serves(config):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)

    with pytest.raises(SystemExit, match="3"):
        main("finetune", serves, needs_ray=lambda config: False)
    assert rows[0]["arguments"] == arguments and rows[0]["begun"] <= rows[0]["ended"]
    monkeypatch.setattr("sys.argv", ["jobs/finetune.py", *arguments[:2], f"run={tmp_path}/none"])
    main("finetune", lambda config: None, needs_ray=lambda config: False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.split("#")[0]).exists(), target
    named = re.findall(r"`((?:docs|infra|configs|jobs|serving|tests|platform)/[\w./-]+)`", text)
    for path in named:
        assert (ROOT / path).exists() or (page.parent / path).exists(), path


@pytest.mark.parametrize("page", [*PAGES[:2], ROOT / "docs/tutorial.md", ROOT / "docs/scaling.md"], ids=lambda page: page.name)
def test_the_settings_of_commands_are_read(page, tmp_path, monkeypatch):
    """Every `python jobs/X.py --config FILE key=value ...` of a page is one that the job takes, with that file of configs/, or
    with the YAML that the page shows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    text = page.read_text()
    for shown in re.findall(r"```yaml\n# (\S+)\n(.*?)```", text, flags=re.S):
        (tmp_path / shown[0]).write_text(shown[1])
    blocks = re.findall(r"```(?:\w*)\n(.*?)```", text, flags=re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in re.findall(r"`([^`\n]+)`", text)]
    commands = [re.search(r"jobs/(\w+)\.py (.*)", line) for line in lines]
    found = [(match[1], shlex.split(match[2], comments=True)) for match in commands if match and "--config" in match[2]]
    for job, words in found:
        file = words[words.index("--config") + 1]
        if file != "FILE":
            settings(job, [word for word in words if "=" in word or word in ("--config", file)])
    assert found or page.name == "scaling.md"


def test_the_messages_of_troubleshooting_are_those_of_the_program():
    text = (ROOT / "docs/troubleshooting.md").read_text()
    source = "".join(file.read_text() for folder in ("platform", "jobs") for file in (ROOT / folder).rglob("*.py"))
    source = re.sub(r'"\s+f?"', "", source)  # texts that go on in the next line
    source = re.sub(r"\{[^{}]*\}", "{}", source)
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.M)
    assert len(messages) > 15
    assert not [message for message in messages if message not in source]
