"""What a step of the on-policy loop costs on one device, beside what train/plan.py reckons: `python jobs/benchmark.py step`.

The step is one worker's share of distill.train: one rollout and one update, through the project's own Distiller, losses, tuning
and gradient checkpointing. Teacher and student have the architecture of the settings with random weights, images and words,
made on the device: memory and time do not depend on what they say. There is neither Ray nor DeepSpeed; AdamW works on float32
copies of the trained weights, as DeepSpeed's does without ZeRO, and the teacher is whole and not quantised.
Units: seconds, bytes, FLOPs; GiB = 2**30 bytes. Shapes as in data/rows.py.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from geodistill.config import Config, changed
from geodistill.data.rows import Responses, Rows, respond
from geodistill.distill.step import Distiller
from geodistill.evaluate.tables import Table
from geodistill.models.row_model import RowModel
from geodistill.models.tuning import tune
from geodistill.train.plan import CARDS, GIB, Load, load_of, memory, models, peak, shapes, work
from geodistill.train.stage import stages

REPEATS = 3  # medians of their times and the most of their memory are told, after one step that is not counted
NO_GPU = "not measured: no GPU"
NO_END = -1  # no token ends a response, so each is as long as the limit


def alone(config: Config) -> Config:
    """The settings of one worker's share of a step, with nothing spread over workers. Raises ConfigError as `changed` does."""
    images = config.distill.train.images_per_step // config.cluster.workers
    whole = ["cluster.workers=1", "cluster.zero_stage=0", "cluster.shard_teacher=false", "distill.teacher_bits=0"]
    return changed(config, [*whole, f"distill.train.images_per_step={images}"])


def device_of(config: Config) -> torch.device:
    """Raises ValueError where there is no GPU for cluster.use_gpu=true."""
    if config.cluster.use_gpu and not torch.cuda.is_available():
        raise ValueError("cluster.use_gpu=true, but torch finds no GPU here; for small models set cluster.use_gpu=false")
    return torch.device("cuda" if config.cluster.use_gpu else "cpu")


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def random_model(made: PreTrainedConfig, device: torch.device, dtype: torch.dtype):
    """A model of a transformers config with its initial random weights, in place: no copy elsewhere or in another type."""
    with device:
        return AutoModelForImageTextToText.from_config(made, dtype=dtype, attn_implementation="sdpa")


class Clocked(RowModel):
    """It notes when it begins to read, and when its first decoding step begins, where the prefill has ended."""

    reading: float | None = None
    decoding: float | None = None

    def hidden(self, ids_RQ: Tensor, position_RQ: Tensor, mask_R1QK: Tensor, z_RND: Tensor | None = None, cache=None) -> Tensor:
        if z_RND is None and self.decoding is None:
            self.decoding = now(ids_RQ.device)
        if z_RND is not None and self.reading is None:
            self.reading = now(ids_RQ.device)
        return super().hidden(ids_RQ, position_RQ, mask_R1QK, z_RND, cache)


class Step:
    """Models, optimizer and random data of a step. config: of one worker (`alone`)."""

    def __init__(self, config: Config):
        stage = stages(config, "distill")[-1]
        teacher_shape, shape = shapes(config, stage)
        assert teacher_shape is not None
        self.device, self.loss, self.train = device_of(config), config.distill.loss, stage.train
        self.dtype = torch.bfloat16 if config.cluster.precision == "bf16" else torch.float32
        self.load, self.pixels, self.patches = load_of(config, stage, shape.patches), shape.pixels, shape.patches
        torch.manual_seed(config.seed)
        made = models(config, stage)
        teacher, student = (random_model(made[role][1], self.device, self.dtype) for role in ("teacher", "student"))
        self.image_token, self.vocabulary = student.config.image_token_id, shape.vocabulary
        linear = self.loss.align > 0 and self.loss.align_map == "linear"
        with self.device:
            align = nn.Linear(shape.hidden, teacher_shape.hidden, bias=False) if linear else None
            tune(student, self.train.tuning, self.train.lora)
        if config.cluster.gradient_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        self.teacher = Clocked(teacher).eval().requires_grad_(False)
        self.student = Clocked(student, align, config.student.model.freeze_tower or self.train.tuning != "full")
        for weight in self.student.parameters():  # adapters and map; not the buffers, whose rotary frequencies need float32
            weight.data = weight.data.to(self.dtype)
        self.trained = [weight for weight in self.student.parameters() if weight.requires_grad]
        whole = self.dtype == torch.float32
        self.master = self.trained if whole else [weight.detach().float().requires_grad_() for weight in self.trained]
        self.optimizer = torch.optim.AdamW(
            self.master, self.train.learning_rate, (0.9, 0.98), weight_decay=self.train.weight_decay, fused=config.cluster.use_gpu
        )
        towers = ((m.tower_hidden, m.tower_layers, m.patches) for m in (teacher_shape, shape))
        forbidden = torch.arange(self.vocabulary, device=self.device) == self.image_token
        self.distiller = Distiller(
            self.student, self.teacher, self.loss, forbidden, NO_END, self.load.tokens, shared_tower=len(set(towers)) == 1
        )

    def words(self, *size: int) -> Tensor:
        """Random tokens that are not the image's."""
        drawn = torch.randint(self.vocabulary - 1, size, device=self.device)
        return drawn + (drawn >= self.image_token)

    def rows(self) -> Rows:
        """Image rows as Packer.pack makes them, with `load.questions` prompts of `plan.prompt_tokens` in each."""
        R, n, P = self.load.rows, self.load.questions, self.load.prompt
        text = (P - self.patches) // n
        ids = self.words(R, P)
        ids[:, : self.patches] = self.image_token
        branch = torch.cat([torch.zeros(self.patches).long(), torch.arange(1, n + 1).repeat_interleave(text)])
        position = torch.cat([torch.arange(self.patches), torch.arange(self.patches, self.patches + text).repeat(n)])
        image = torch.arange(self.load.images).repeat_interleave(R // self.load.images)
        last, start = self.words(R, n), torch.full((R, n), self.patches + text)
        alive = torch.ones(R, n, dtype=torch.bool)
        code, number = torch.arange(1, n + 1).repeat(R, 1), torch.arange(R * n).reshape(R, n)
        return Rows(image, ids, branch.repeat(R, 1), position.repeat(R, 1), last, start, alive, code, number, []).to(self.device)

    def answers(self, rows: Rows) -> Responses:
        tokens = self.words(*rows.last_Rn.shape, self.load.tokens)
        return respond(rows, tokens, torch.full_like(rows.last_Rn, self.load.tokens))

    def images(self) -> Tensor:
        return torch.randn(self.load.images, 3, self.pixels, self.pixels, dtype=self.dtype, device=self.device)

    def run(self) -> dict[str, Any]:
        """One step, as update_on_policy of train/loop.py makes it.

        seconds: of each part; peak: bytes at most in each moment that plan.memory names (empty without a GPU); tokens: how many
        were decoded; loss: its sum over the passes.
        """
        seconds: dict[str, float] = {"decode": 0.0}
        most: dict[str, int] = {}

        @contextmanager
        def moment(name: str) -> Iterator[None]:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = now(self.device)
            yield
            seconds[name] = now(self.device) - start
            if self.device.type == "cuda":
                most[name] = torch.cuda.max_memory_allocated()

        drawn = [(self.rows(), self.images()) for _ in range(self.load.micros)]
        corpus_rows = [(self.rows(), self.images()) for _ in range(self.load.micros if self.loss.pretrain > 0 else 0)]
        items, corpus = [], []
        self.student.eval()
        with moment("rollout"):
            for number, (rows, pixels) in enumerate(drawn):
                for model in (self.teacher, self.student):
                    model.reading = model.decoding = None
                items.append(self.distiller.rollout(rows, pixels, torch.Generator(self.device).manual_seed(number)))
                end = now(self.device) if self.teacher.decoding else self.teacher.reading  # with alpha=0 it reads behind decoding
                begin = self.teacher.decoding or self.student.decoding
                assert begin is not None and end is not None
                seconds["decode"] += end - begin
            with_teacher = self.loss.preset == "reference"
            for rows, pixels in corpus_rows:
                corpus.append(self.distiller.labelled(rows, self.answers(rows), pixels, with_teacher))
        tokens = sum(len(item.batch.token) for item in items)
        image_tokens = sum(item.z_teacher[..., 0].numel() for item in items)
        total = torch.zeros((), device=self.device)
        self.student.train()
        with moment("update"):
            for item in items:
                value, _ = self.distiller.on_policy_pass(self.student, item, tokens, image_tokens)
                value.backward()
                total += value.detach()
            for labelled in corpus:
                value, _ = self.distiller.labelled_pass(self.student, labelled, sum(i.tokens for i in corpus), "pretrain")
                (self.loss.pretrain * value).backward()
                total += self.loss.pretrain * value.detach()
        with moment("optimizer's step"):
            self.step()
        seconds["tower and prefill"] = seconds.pop("rollout") - seconds["decode"]
        return {"seconds": seconds, "peak": most, "tokens": tokens, "loss": total.item()}

    def step(self) -> None:
        """Clip, update, and forget the gradients."""
        for weight, copy in zip(self.trained, self.master, strict=True):
            if copy is not weight and weight.grad is not None:
                copy.grad = weight.grad.float()
        if self.train.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.master, self.train.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            for weight, copy in zip(self.trained, self.master, strict=True):
                if copy is not weight:
                    weight.copy_(copy)
                weight.grad = copy.grad = None


def measure_step(config: Config) -> dict[str, Any]:
    """Memory, time and rates of a step on this device, and what train/plan.py estimates for the same load on plan.gpu.

    figures: name -> unit, measured, estimated, ratio of the two; None: not measured, or not to be compared. Shares are those of
    the card's data sheet (plan.CARDS), by the FLOPs and the bytes of plan.work: FLOPs / time / rate in prefill and update,
    weights and KV caches / time / bandwidth in decoding.
    Raises ValueError where there is no GPU for cluster.use_gpu=true, or the step does not fit the device's memory.
    """
    device, one = device_of(config), alone(config)
    stage, plan, gpu = stages(one, "distill")[-1], one.plan, device.type == "cuda"
    if gpu:
        name, free = torch.cuda.get_device_name(), torch.cuda.get_device_properties(device).total_memory / GIB - plan.reserve
    else:
        name, free = "cpu", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    moment, parts = peak(one, stage)
    need = sum(parts.values()) / GIB
    if need > free:
        raise ValueError(
            f"this step needs {need:.1f} GiB ({moment}), of which {name} has {free:.1f}; try distill.train.tuning=lora, "
            "cluster.gradient_checkpointing=true, a smaller distill.train.images_per_micro_batch, or smaller models"
        )
    planned = gpu and plan.gpu.split("-")[0] in name.replace(" ", "")  # is it the card that the estimates are for?

    step = Step(one)
    print(f"[benchmark] {name}: models are made, {1 + REPEATS} steps follow", flush=True)
    runs = [step.run() for _ in range(1 + REPEATS)][1:]
    load, cost, card = step.load, work(one, stage), CARDS[plan.gpu]
    cost["tower and prefill"] = cost["tower"]._replace(
        flops=sum(cost[part].flops for part in ("tower", "prefill", "teacher's pass"))  # the last with alpha=0 alone
    )
    seconds = {part: median(run["seconds"][part] for run in runs) for part in runs[0]["seconds"]}
    estimated = {part: cost[part].seconds(one) for part in ("tower and prefill", "decode", "update")}
    rate = 1e12 * (card.bf16 if one.cluster.precision == "bf16" else card.fp32)

    figures: dict[str, dict[str, Any]] = {}

    def add(name: str, unit: str, measured: float | None, estimate: float | None, comparable: bool = planned) -> None:
        ratio = measured / estimate if measured is not None and estimate and comparable else None
        figures[name] = {"unit": unit, "measured": measured, "estimated": estimate, "ratio": ratio}

    for moment, parts in memory(one, stage).items():
        most = max(run["peak"][moment] for run in runs) / GIB if gpu else None
        add(f"peak memory, {moment}", "GiB", most, sum(parts.values()) / GIB, gpu)
    for part in ("tower and prefill", "decode", "update", "optimizer's step"):
        add(part, "s", seconds[part], estimated.get(part))
    responses = load.micros * load.responses
    samples = load.rows * load.micros * (2 if one.distill.loss.pretrain > 0 else 1)
    add("decode, rate", "tokens/s", runs[0]["tokens"] / seconds["decode"], responses / estimated["decode"])
    add("update, rate", "image rows/s", samples / seconds["update"], samples / estimated["update"])
    for part, done, full, share in (
        ("tower and prefill", cost["tower and prefill"].flops, rate, plan.matmul_share),
        ("update", cost["update"].flops, rate, plan.matmul_share),
        ("decode", cost["decode"].read, 1e9 * card.bandwidth, plan.bandwidth_share),
    ):
        what = "bandwidth" if part == "decode" else f"{one.cluster.precision} rate"
        add(f"{part}, share of the card's {what}", "", done / seconds[part] / full if planned else None, share)
    return {
        "device": name,
        "card": plan.gpu,
        "precision": one.cluster.precision,
        "torch": torch.__version__,
        "repeats": REPEATS,
        "load": load._asdict(),
        "tokens": runs[0]["tokens"],
        "loss": [run["loss"] for run in runs],
        "flops": {part: cost[part].flops for part in ("tower and prefill", "decode", "update")},
        "decode_bytes": cost["decode"].read,
        "seconds": [run["seconds"] for run in runs],
        "figures": figures,
    }


def step_table(found: dict[str, Any]) -> str:
    """`measure_step` in words."""
    on_gpu = found["device"] != "cpu"
    lacking = f"not measured: not a {found['card']}" if on_gpu else NO_GPU

    def cell(value: float | None) -> str:
        return f"{value:.4g}" if value is not None else "-"

    rows = [
        [
            f"{name}, {one['unit']}" if one["unit"] else name,
            lacking if one["measured"] is None else cell(one["measured"]),
            cell(one["estimated"]),
            cell(one["ratio"]),
        ]
        for name, one in found["figures"].items()
    ]
    load = Load(**found["load"])
    note = (
        f"{load.rows * load.questions} responses of {load.tokens} tokens in each of {load.micros} micro-batches of {load.images} "
        f"images; medians of {found['repeats']} steps. Estimates: {found['card']}, {found['precision']}, without DeepSpeed, "
        "other workers and AdamW's own time; what gradient checkpointing does again counts as FLOPs of the update."
    )
    columns = [("", "measured"), ("", "plan.py"), ("", "ratio")]
    return Table(f"A step of the on-policy loop on {found['device']}", columns, rows, note, label="").text()
