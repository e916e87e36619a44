"""What the losses on [responses, vocabulary] cost: `python jobs/benchmark.py loss`.

From the last hidden states of student and teacher to KL(q || p) of every response token, its sum, and the gradients of the
student's hidden states and head. ours: distill/losses.py, in chunks that are computed again in the backward pass. dense: the
same by torch's autograd on whole [M, V] tensors, as one would write it. trl: what TRL's DistillationTrainer calls
(ChunkedDivergenceFunction), where trl is installed. Random numbers; float32 on the CPU, bfloat16 on a GPU.
Extra memory is what a forward and backward pass holds at its peak beyond its inputs, the gradients of those included.
Shapes: M response tokens, V vocabulary, D width. Units: seconds, MB = 1e6 bytes.
"""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from geodistill.benchmarks.step import device_of, now
from geodistill.config import Config
from geodistill.distill import losses
from geodistill.evaluate.tables import Table

TOKENS, VOCABULARY = (2048, 8192), 32000
WIDTHS = {"cpu": (256, 512), "cuda": (4096, 5120)}  # of student and teacher
ROUNDS, REPEATS = 2, 2  # processes for each, which take turns; passes of each, behind one that is not timed
WHO = ("ours", "dense", "trl")
MOST = 500.0  # MB that ours may take at any M


class Pass:
    """One forward and backward pass of one contestant on M tokens."""

    def __init__(self, who: str, tokens: int, device: torch.device):
        torch.manual_seed(0)
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.device, widths = device, WIDTHS[device.type]

        def drawn(rows: int, width: int, scale: float) -> Tensor:
            return (scale * torch.randn(rows, width, device=device)).to(dtype)

        self.head_q, self.head_p = (drawn(VOCABULARY, width, 2 * width**-0.5) for width in widths)
        self.hidden_q, self.hidden_p = (drawn(tokens, width, 1.0) for width in widths)
        self.head_q.requires_grad_()
        self.hidden_q.requires_grad_()
        self.token = torch.randint(VOCABULARY, (tokens,), device=device)
        self.none = torch.zeros(VOCABULARY, dtype=torch.bool, device=device)
        self.value: Callable[[], Tensor] = {"ours": self.ours, "dense": self.dense, "trl": self.trl}[who]

    def ours(self) -> Tensor:
        def make(hidden_q: Tensor, hidden_p: Tensor, token: Tensor) -> losses.Terms:
            with torch.no_grad():
                logits_p = hidden_p @ self.head_p.T
            return losses.compare(hidden_q @ self.head_q.T, logits_p, token, 1.0, self.none)

        def objective(terms: losses.Terms) -> Tensor:
            return terms.reverse_kl.sum()

        count = losses.chunks_of(len(self.token), VOCABULARY)
        weighs = losses.derivatives(objective, losses.Terms(*torch.zeros(6, len(self.token), device=self.device)))
        inputs = self.hidden_q, self.hidden_p, self.token
        return losses.at_once(make, objective, weighs, count, [self.head_q], *inputs)[0]

    def dense(self) -> Tensor:
        log_q = torch.log_softmax((self.hidden_q @ self.head_q.T).float(), -1)
        with torch.no_grad():
            log_p = torch.log_softmax((self.hidden_p @ self.head_p.T).float(), -1)
        return (log_q.exp() * (log_q - log_p)).sum()

    def trl(self) -> Tensor:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        teacher = self.hidden_p, self.head_p, None
        rest = 1.0, 1.0, 1.0, None, 1.0, None  # beta (reverse KL), temperature, scale and soft cap of both heads
        return ChunkedDivergenceFunction.apply(self.hidden_q, self.head_q, None, *teacher, *rest)[0].sum()

    def run(self) -> tuple[float, float, float]:
        """(seconds, MB at the peak beyond the inputs, the value)."""
        self.hidden_q.grad = self.head_q.grad = None
        before = self._memory(reset=True)
        start = now(self.device)
        value = self.value()
        value.backward()
        seconds = now(self.device) - start
        return seconds, (self._memory() - before) / 1e6, value.item()

    def _memory(self, reset: bool = False) -> float:
        """Bytes in use at most since the last reset; with `reset` those in use now."""
        if self.device.type == "cuda":
            if reset:
                torch.cuda.reset_peak_memory_stats()
            return torch.cuda.max_memory_allocated()
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def passes(who: str, tokens: int, device: str) -> list[tuple[float, float, float]]:
    """What 1 + REPEATS passes took, in a process of their own: the first has all the memory to ask for."""
    torch.set_num_threads(1)
    one = Pass(who, tokens, torch.device(device))
    return [one.run() for _ in range(1 + REPEATS)]


def measure_loss(config: Config) -> dict[str, Any]:
    """who -> M -> seconds (median) and extra MB (most) of a pass, and the ratios of the others' seconds to ours.

    Raises ValueError where there is no GPU for cluster.use_gpu=true.
    """
    device = device_of(config).type
    there = [who for who in WHO if who != "trl" or find_spec("trl")]
    found: dict[str, dict[str, Any]] = {who: {} for who in there}
    begun = time.time()
    for tokens in TOKENS:
        runs: dict[str, list[tuple[float, float, float]]] = {who: [] for who in there}
        for _ in range(ROUNDS):
            for who in there:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                    runs[who].append((first := alone.submit(passes, who, tokens, device).result())[0])
                runs[who] += first[1:]
                print(
                    f"[benchmark] loss of {tokens} tokens, {who}: {first[-1][0]:.2f} s ({time.time() - begun:.0f} s in all)",
                    flush=True,
                )
        values = {who: runs[who][0][2] for who in there}
        for who in there:
            counted = [run for i, run in enumerate(runs[who]) if i % (1 + REPEATS)]
            extra = max(run[1] for i, run in enumerate(runs[who]) if i % (1 + REPEATS) == 0)
            found[who][str(tokens)] = {"seconds": median(run[0] for run in counted), "extra_mb": extra, "value": values[who]}
    ratios = {
        f"loss: {who} / ours, {tokens} tokens": found[who][str(tokens)]["seconds"] / found["ours"][str(tokens)]["seconds"]
        for who in there[1:]
        for tokens in TOKENS
    }
    return {"device": device, "vocabulary": VOCABULARY, "widths": WIDTHS[device], "who": found, "ratios": ratios}


def loss_table(found: dict[str, Any]) -> str:
    """`measure_loss` in words, against its targets."""
    rows = []
    for who, by_tokens in found["who"].items():
        cells = [who]
        for tokens, one in by_tokens.items():
            own = found["who"]["ours"][tokens]
            cells += [f"{one['seconds']:.2f}", f"{one['seconds'] / own['seconds']:.2f}", f"{one['extra_mb']:.0f}"]
        rows.append(cells)
    columns = [(f"{m} tokens", name) for m in TOKENS for name in ("seconds", "/ ours", "extra MB")]
    note = f"V = {found['vocabulary']}, widths {found['widths']}. Targets: ours <= {MOST:.0f} MB at any M, dense / ours >= 1."
    note += "" if "trl" in found["who"] else " trl is not installed: pip install 'geodistill[bench]'."
    return Table(f"Loss on [responses, vocabulary], {found['device']}", columns, rows, note, label="").text()
