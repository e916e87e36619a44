"""The contestants of distill.py: ours, TRL's and the port of MiniLLM's, each a process that steps at its parent's word.

Units: seconds, bytes.
"""

import ctypes
import gc
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaProcessor, PrinterCallback, TrainerCallback

from geodistill.benchmarks.minillm import ALPHA, MiniLLM, Prompts
from geodistill.benchmarks.step import NO_END, now
from geodistill.config import LossConfig, ModelConfig
from geodistill.data.record import Conversation
from geodistill.data.rows import Packer, Question, Rows
from geodistill.distill.step import Distiller
from geodistill.language import IMAGE, SHORT_ANSWER
from geodistill.models.assemble import forbidden_tokens, load_tokenizer, new_model, new_processor
from geodistill.models.row_model import row_model
from geodistill.models.vision import normalize

TOKENIZER = Path(__file__).parents[3] / "configs/demo-teacher"
SAMPLES, RESPONSE = 16, 16  # responses a step, and tokens of each
UPDATES = 4  # of a rollout, against MiniLLM: its published inner epochs
LEARNING_RATE, CLIP, SEED = 1e-5, 1.0, 0
THINGS = ("airplanes", "ships", "bridges", "vehicles", "storage tanks", "tennis courts", "roads", "buildings")
QUESTIONS = [f"What is the number of {a}? {SHORT_ANSWER}" for a in THINGS] + [
    f"Are there more {a} than {b}? {SHORT_ANSWER}" for a, b in zip(THINGS, THINGS[1:] + THINGS[:1], strict=True)
]
OURS, TRL, MINILLM = "ours", "trl", "minillm"  # TRL and MINILLM name what ours is compared with, too
LOSSES = {
    TRL: LossConfig(alpha=0.0, long=0.0, align=0.0, pretrain=0.0),
    MINILLM: LossConfig(preset="reference", alpha=ALPHA, align=0.0, pretrain=0.0, updates_per_rollout=UPDATES),
}
READY, NO_MEMORY = "ready", "not measured: out of memory"


@dataclass(frozen=True)
class Pair:
    """Sizes of student and teacher. vocabulary: rows of their heads; 0: those of the tokenizer."""

    name: str
    student: ModelConfig
    teacher: ModelConfig
    vocabulary: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Setting:
    """One pair of models at one number of image tokens, on one device."""

    pair: Pair
    image_tokens: int
    device: str = "cpu"
    threads: int = 1


class Made(NamedTuple):
    """student, teacher: transformers models; forbidden: bool [V], tokens that no response may hold."""

    student: Any
    teacher: Any
    processor: LlavaProcessor
    forbidden: Tensor
    side: int  # pixels of an image


def make(setting: Setting) -> Made:
    """The same models, bit for bit, for every contestant: the student with the teacher's tower, which is frozen."""
    pair, device = setting.pair, torch.device(setting.device)
    patch = pair.student.vision.patch
    side = round(setting.image_tokens**0.5) * patch
    assert (side // patch) ** 2 == setting.image_tokens
    tokenizer = load_tokenizer(TOKENIZER)
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(pair.dtype)
    try:
        with device:
            teacher, student = (
                new_model(replace(sizes, vision=replace(sizes.vision, image_size=side)), tokenizer)
                for sizes in (pair.teacher, pair.student)
            )
    finally:
        torch.set_default_dtype(before)
    for model in (teacher, student):
        if pair.vocabulary:
            model.resize_token_embeddings(pair.vocabulary, mean_resizing=False)
    student.model.vision_tower.load_state_dict(teacher.model.vision_tower.state_dict())
    student.model.vision_tower.requires_grad_(False)
    teacher.eval().requires_grad_(False)
    forbidden = forbidden_tokens(tokenizer, len(tokenizer))
    forbidden[tokenizer.eos_token_id] = True
    forbidden = torch.cat([forbidden, forbidden.new_zeros(student.lm_head.out_features - len(forbidden))]).to(device)
    return Made(student, teacher, new_processor(tokenizer, side, patch), forbidden, side)


class Asked(NamedTuple):
    """One image and its questions."""

    image: Image.Image
    questions: list[str]


def samples(side: int, n: int) -> list[Asked]:
    """SAMPLES questions in all, n of each image: always the same ones."""
    noise = [np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8) for i in range(SAMPLES // n)]
    return [Asked(Image.fromarray(pixels), QUESTIONS[i * n : (i + 1) * n]) for i, pixels in enumerate(noise)]


def packer(made: Made, n: int) -> Packer:
    return Packer(made.processor.tokenizer, IMAGE, (made.side // made.processor.patch_size) ** 2, RESPONSE, n)


def questions(packer: Packer, asked: list[Asked]) -> list[list[Question]]:
    """The questions of each image, tokenised."""
    said = [[Conversation("vqa", [(question, None)]) for question in one.questions] for one in asked]
    return [packer.questions(str(i), one, with_answers=False) for i, one in enumerate(said)]


def prepared(made: Made, images: list[Image.Image]) -> Tensor:
    """Images -> what a tower takes [B, 3, side, side]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return normalize(stacked.to(made.forbidden.device)).to(made.teacher.dtype)


def new_optimizer(student: nn.Module) -> torch.optim.AdamW:
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, LEARNING_RATE, (0.9, 0.98), weight_decay=0.0)


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One update of the weights."""
    loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], CLIP)
    optimizer.step()
    optimizer.zero_grad()


# The clock and the memory of a step


def resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since the last reset."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name))
    return 1024 * int(line.split()[1])


def clock(device: torch.device) -> np.ndarray:
    """Seconds, once the device has done what it was given: [by the clock, of this process on its CPUs]."""
    return np.array([now(device), time.process_time()])


class Turn:
    """A contestant's steps, one at each word of the parent. peak: bytes at most in the step; extra: above those before it."""

    def __init__(self, pipe: Connection, device: torch.device):
        self.pipe, self.device = pipe, device

    def begin(self) -> None:
        self.pipe.recv()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            if platform.libc_ver()[0] == "glibc":  # give back what is free, or a step would seem to need no memory
                ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident("VmRSS")
        self.start = clock(self.device)

    @property
    def passed(self) -> np.ndarray:
        """Seconds of this step, as of `clock`."""
        return clock(self.device) - self.start

    def end(self, tokens: int, rollout: np.ndarray, prepare: np.ndarray | None = None) -> None:
        """tokens: written; rollout: seconds before the updates; prepare: seconds that do not count; as of `clock`."""
        off = np.zeros(2) if prepare is None else prepare
        seconds, cpu = (float(value) for value in self.passed - off)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else resident("VmHWM")
        parts = {"rollout": float(rollout[0]), "cpu_rollout": float(rollout[1]), "prepare": float(off[0])}
        memory = {"peak": peak, "extra": peak - self.before}
        self.pipe.send({"seconds": seconds, "cpu": cpu, "tokens": tokens} | parts | memory)


# The contestants


class Ours:
    """Rollout and updates of train/loop.py, for either comparison. student, teacher: RowModels."""

    def __init__(self, made: Made):
        self.made = made
        image_processor = made.processor.image_processor
        self.student, self.teacher = (row_model(model, image_processor) for model in (made.student, made.teacher))
        self.optimizer = new_optimizer(self.student)
        self.distillers = {
            rival: Distiller(self.student, self.teacher, loss, made.forbidden, NO_END, RESPONSE, shared_tower=True)
            for rival, loss in LOSSES.items()
        }

    def batch(self, n: int) -> tuple[Rows, Tensor]:
        """(rows, pixels) of a step: n questions share a row."""
        asked, own = samples(self.made.side, n), packer(self.made, n)
        rows = own.pack(questions(own, asked)).to(self.made.forbidden.device)
        return rows, prepared(self.made, [one.image for one in asked])

    def run(self, orders: list[tuple[int, str]], turn: Turn) -> None:
        """orders: n and rival of each step."""
        batches = {n: self.batch(n) for n, _ in orders}
        for number, (n, rival) in enumerate(orders):
            distiller, generator = self.distillers[rival], torch.Generator(turn.device).manual_seed(number)
            turn.begin()
            self.student.eval()
            item = distiller.rollout(*batches[n], generator)
            tokens, rollout = int(item.responses.valid_RC.sum()), turn.passed
            self.student.train()
            for _ in range(distiller.loss.updates_per_rollout):
                update(distiller.on_policy_pass(self.student, item, tokens, 1)[0], self.optimizer)
            del item
            turn.end(tokens, rollout)


def prompts_of(made: Made, n: int) -> Prompts:
    """The prompts of a step, one question a sequence."""
    asked, own = samples(made.side, n), packer(made, n)
    ids = [own.prefix + question.prompt for one in questions(own, asked) for question in one]
    longest, pad = max(map(len, ids)), made.processor.tokenizer.pad_token_id
    padded = torch.tensor([[pad] * (longest - len(one)) + one for one in ids])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in ids])
    pixels = prepared(made, [one.image for one in asked]).repeat_interleave(n, 0)
    return Prompts(padded.to(pixels.device), mask.to(pixels.device), pixels)


def run_minillm(made: Made, orders: list[tuple[int, str]], turn: Turn) -> None:
    port = MiniLLM(made.student.eval(), made.teacher, made.forbidden, RESPONSE, torch.Generator(turn.device).manual_seed(SEED))
    batches, optimizer = {n: prompts_of(made, n) for n, _ in orders}, new_optimizer(made.student)
    for n, _ in orders:
        turn.begin()
        stored = port.sample(batches[n])
        tokens, rollout = stored.tokens_BT.numel(), turn.passed
        for _ in range(UPDATES):
            update(port.loss(stored), optimizer)
        del stored
        turn.end(tokens, rollout)


class Clocked(LlavaProcessor):
    """A processor that adds up the seconds in which it prepares images and words, as of `clock`."""

    spent = np.zeros(2)

    def __call__(self, *args, **kwargs):
        start = clock(torch.device("cpu"))
        found = super().__call__(*args, **kwargs)
        self.spent = self.spent + clock(torch.device("cpu")) - start
        return found


def trl_trainer(made: Made, orders: list[int], folder: str, callbacks: list):
    """TRL's trainer of one step for each n of `orders`. It writes nothing in `folder`."""
    from trl import DistillationConfig, DistillationTrainer

    made.processor.__class__ = Clocked
    rows = [
        {"prompt": [{"role": "user", "content": question}], "image": asked.image}
        for n in orders
        for asked in samples(made.side, n)
        for question in asked.questions
    ]
    args = DistillationConfig(
        output_dir=folder,
        max_steps=len(orders),
        per_device_train_batch_size=SAMPLES,
        gradient_accumulation_steps=1,
        max_completion_length=RESPONSE,
        generation_kwargs={"suppress_tokens": made.forbidden.nonzero()[:, 0].tolist()},
        beta=1.0,
        temperature=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=made.forbidden.device.type == "cpu",
        shuffle_dataset=False,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=SEED,
    )
    trainer = DistillationTrainer(
        model=made.student,
        teacher_model=made.teacher,
        args=args,
        train_dataset=rows,
        processing_class=made.processor,
        callbacks=callbacks,
        optimizers=(new_optimizer(made.student), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def run_trl(made: Made, orders: list[tuple[int, str]], turn: Turn) -> None:
    tokens, rollout = 0, np.zeros(2)
    generate, end = made.student.generate, torch.tensor(made.processor.tokenizer.eos_token_id, device=turn.device)

    def timed(**given):
        nonlocal tokens, rollout
        start = clock(turn.device)
        found = generate(**given)
        rollout = rollout + clock(turn.device) - start
        tokens += int((found[:, given["input_ids"].shape[1] :] != end).sum())
        return found

    class Turns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            nonlocal tokens, rollout
            tokens, rollout = 0, np.zeros(2)
            turn.begin()
            made.processor.spent = np.zeros(2)

        def on_step_end(self, args, state, control, **kwargs):
            turn.end(tokens, rollout, made.processor.spent)

    made.student.generate = timed
    with TemporaryDirectory() as folder:
        trl_trainer(made, [n for n, _ in orders], folder, [Turns()]).train()


RUN: dict[str, Callable[[Made, list[tuple[int, str]], Turn], None]] = {
    OURS: lambda made, orders, turn: Ours(made).run(orders, turn),
    TRL: run_trl,
    MINILLM: run_minillm,
}


def contestant(name: str, setting: Setting, orders: list[tuple[int, str]], pipe: Connection) -> None:
    """One process: make the models, say so, then a step at each word. A text that is not READY says why there is no more."""
    try:
        torch.set_num_threads(setting.threads)
        made = make(setting)
        pipe.send(READY)
        RUN[name](made, orders, Turn(pipe, torch.device(setting.device)))
    except torch.cuda.OutOfMemoryError:
        pipe.send(NO_MEMORY)
    except EOFError:  # the parent has ended
        pass
    except Exception:
        pipe.send(traceback.format_exc())
