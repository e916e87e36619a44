"""Early warning of a student that collapses: it repeats itself, is sure of the wrong, or writes ever longer or shorter."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

BEGINNING = 3  # lines of metrics that tell how the student was
REPEATED = 0.25  # share of repeated pairs of tokens from which a response is none
FEWER, MORE = 0.4, 2.5  # of the length, or of the share that ends by itself, at the beginning
CERTAIN, FAR = 0.1, 0.8  # entropy below so much of the beginning's, while the reverse KL is still above so much of it


def split(token_M: Tensor, sequence_M: Tensor) -> list[list[int]]:
    """The token ids of each response. token_M, sequence_M: as `Responses.flat` has them."""
    found: list[list[int]] = []
    before = None
    for token, sequence in zip(token_M.tolist(), sequence_M.tolist(), strict=True):
        if sequence != before:
            found.append([])
            before = sequence
        found[-1].append(token)
    return found


def repetition(responses: Sequence[Sequence[int]]) -> float:
    """The sum over responses of the share of its pairs of neighbouring tokens that stand in it before; 0 for fewer than two."""
    total = 0.0
    for response in responses:
        pairs = [*pairwise(response)]
        total += 1 - len(set(pairs)) / len(pairs) if len(pairs) > 1 else 0.0
    return total


class Watch:
    """Compares each line of metrics with the mean of the first ones.

    state: what a checkpoint has kept of it, or {} at the start of a run.
    """

    KEYS = ("entropy", "reverse_kl", "repetition", "length", "finished")

    def __init__(self, state: dict):
        self.sums: dict[str, float] = dict(state.get("sums", {}))
        self.lines: int = state.get("lines", 0)

    @property
    def state(self) -> dict:
        return {"sums": dict(self.sums), "lines": self.lines}

    def look(self, row: dict[str, float]) -> list[str]:
        """What is wrong with this line of metrics, each with its figure and that of the beginning; [] where nothing is."""
        if not all(key in row for key in self.KEYS):
            return []
        if self.lines < BEGINNING:
            self.lines += 1
            self.sums = {key: self.sums.get(key, 0.0) + row[key] for key in self.KEYS}
            return []
        first = {key: total / self.lines for key, total in self.sums.items()}
        wrong = []
        if row["repetition"] > max(REPEATED, 2 * first["repetition"]):
            wrong.append("repetition")
        if not FEWER < row["length"] / max(first["length"], 1e-9) < MORE:
            wrong.append("length")
        if row["finished"] < FEWER * first["finished"]:
            wrong.append("finished")
        if row["entropy"] < CERTAIN * first["entropy"] and row["reverse_kl"] > FAR * first["reverse_kl"]:
            wrong.append("entropy")
        words = {
            "repetition": "share of repeated pairs of tokens",
            "length": "response length",
            "finished": "share of responses that end by themselves",
            "entropy": "entropy of a student that is no nearer to its teacher",
        }
        return [f"{words[key]} {row[key]:.3g} ({first[key]:.3g} at the start)" for key in wrong]
