"""The warning of a collapsing student: what it counts, when it speaks, and that it keeps quiet where all is well."""

import json
from types import SimpleNamespace

import pytest
import torch

from geodistill.train.collapse import BEGINNING, Watch, repetition, split
from geodistill.train.reporter import Reporter
from geodistill.train.run import Run

WELL = {"entropy": 1.0, "reverse_kl": 1.5, "repetition": 0.02, "length": 7.0, "finished": 0.95}


def test_responses_are_told_apart():
    assert split(torch.tensor([5, 6, 7, 8, 9]), torch.tensor([1, 1, 4, 4, 2])) == [[5, 6], [7, 8], [9]]


def test_repetition_is_the_share_of_pairs_that_came_before():
    assert repetition([[1, 2, 3, 4]]) == 0
    assert repetition([[1, 1, 1, 1, 1]]) == 0.75  # four pairs, three of them again
    assert repetition([[1, 2, 1, 2, 1]]) == 0.5
    assert repetition([[], [1], [1, 2]]) == 0
    assert repetition([[1, 1, 1], [1, 2, 3]]) == 0.5  # a sum over responses


def watched() -> Watch:
    watch = Watch({})
    for _ in range(BEGINNING):
        assert watch.look(WELL) == []
    return watch


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"repetition": 0.6}, "share of repeated pairs of tokens 0.6 (0.02 at the start)"),
        ({"length": 20.0}, "response length 20 (7 at the start)"),
        ({"length": 1.5}, "response length 1.5 (7 at the start)"),
        ({"finished": 0.2}, "share of responses that end by themselves 0.2 (0.95 at the start)"),
        ({"entropy": 0.05}, "entropy of a student that is no nearer to its teacher 0.05 (1 at the start)"),
    ],
)
def test_each_kind_of_collapse_is_named_with_its_figures(change, said):
    assert watched().look(WELL | change) == [said]


def test_a_student_that_learns_is_left_alone():
    watch = watched()
    for share in (0.8, 0.5, 0.3):  # surer and nearer to its teacher
        assert watch.look(WELL | {"entropy": share, "reverse_kl": 1.5 * share, "length": 9.0}) == []
    assert watch.look(WELL | {"entropy": 0.05, "reverse_kl": 0.2}) == []
    assert watch.look({"loss": 1.0}) == []  # a stage without rollouts


def test_a_resumed_watch_knows_the_beginning():
    again = Watch(watched().state)
    assert len(again.look(WELL | {"length": 30.0, "repetition": 0.5})) == 2


def test_the_warning_tells_the_step_and_shows_responses(tmp_path, capsys, tokenizer, questions, make_packer):
    """As the loop calls it, on rank 0 alone; once more in the file."""
    words = tokenizer("yes yes yes", add_special_tokens=False).input_ids
    rows = make_packer(8).pack(questions[:1])
    batch = SimpleNamespace(token=torch.tensor(words * 2), sequence=torch.tensor([3] * len(words) + [4] * len(words)))
    run = SimpleNamespace(written=SimpleNamespace(rows=rows, batch=batch), processor=SimpleNamespace(tokenizer=tokenizer))
    report = Reporter.__new__(Reporter)
    report.stage, report.rank, report.watch = SimpleNamespace(name="distill", folder=str(tmp_path)), 0, watched()
    report.folder, report.row = tmp_path, {"step": 40} | WELL
    report.warn(lambda: Run.samples(run))
    assert capsys.readouterr().out == "" and not (tmp_path / "warnings.jsonl").exists()
    report.row |= {"repetition": 0.6}
    report.warn(lambda: Run.samples(run))
    said = capsys.readouterr().out
    assert "WARNING, step 40" in said and f"{rows.questions[0][0].text} -> yes yes yes" in said
    kept = json.loads((tmp_path / "warnings.jsonl").read_text())
    assert kept["step"] == 40 and len(kept["samples"]) == 2
    assert Run.samples(SimpleNamespace(written=None)) == []
