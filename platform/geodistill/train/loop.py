"""The loop that every Ray Train worker runs: sft, kd and the on-policy loop of Table 1 alike. Read it top to bottom."""

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor, nn

from geodistill.config import Config, TrainConfig
from geodistill.data.features import check_features, to_tensor
from geodistill.data.files import download
from geodistill.data.rows import Rows, padding
from geodistill.data.stream import MicroBatch, PackerSpec, new_packer, read_split, stream
from geodistill.distill.step import Distiller, Experience, Labelled, Seen
from geodistill.models import assemble
from geodistill.models.attention import faster
from geodistill.models.row_model import RowModel, row_model
from geodistill.models.tuning import merged_weights, tune
from geodistill.train import engine
from geodistill.train.checkpoint import Checkpoints
from geodistill.train.collapse import repetition, split
from geodistill.train.plan import check_memory
from geodistill.train.reporter import Reporter
from geodistill.train.stage import Stage, checkpoints_of


class NotFinite(RuntimeError):
    """Loss or gradient norm is NaN or infinite; the message says at which step and which checkpoint is left."""


class Stopped(Exception):
    """The run was told to stop in the middle of a step, which is dropped: its weights are still those of the step before."""


def learning_rate(train: TrainConfig, step: int) -> float:
    """Cosine with linear warm-up; step counts from 0."""
    warm = max(1, round(train.warmup * train.steps))
    if step < warm:
        return train.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, train.steps - warm)
    low = train.final_learning_rate
    return train.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))


def mixed_seed(*numbers: int) -> int:
    """One seed of 32 bits from several numbers: a CPU generator of torch reads no more than that."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def build(config: Config, stage: Stage, dtype: torch.dtype):
    """(student model, its processor, teacher model or None), in `dtype`. The tokenizer is the teacher's where there is one."""
    sizes = getattr(config, stage.role).model
    start = stage.weights or sizes.init
    teacher = None
    if stage.teacher:
        teacher, _ = assemble.load(stage.teacher, dtype, config.distill.teacher_bits)
    if start:
        student, processor = assemble.load(start, dtype)
    else:
        brings = stage.teacher or config.teacher.model.init
        source = brings or download(config.data.shards, "tokenizer", Path(tempfile.mkdtemp()))
        tokenizer = assemble.load_tokenizer(source)
        student = assemble.new_model(sizes, tokenizer)
        vision = student.config.vision_config
        processor = assemble.new_processor(tokenizer, vision.image_size, vision.patch_size)
    return student, processor, teacher


def align_map(config: Config, student, teacher) -> nn.Module | None:
    """The learned map A from the student's width to the teacher's, or None where it is not used."""
    loss = config.distill.loss
    if teacher is None or loss.align == 0:
        return None
    widths = student.config.get_text_config().hidden_size, teacher.config.get_text_config().hidden_size
    if loss.align_map == "linear":
        return nn.Linear(*widths, bias=False)
    if widths[0] != widths[1]:
        raise ValueError(
            f"distill.loss.align_map=identity needs equal widths, but the student has {widths[0]} and the teacher "
            f"{widths[1]}; use align_map=linear"
        )
    return None


class Run:
    """One worker's models, engine and data, made once."""

    def __init__(self, job: dict):
        self.config, self.stage, (self.notice,) = job["config"], job["stage"], job["notice"]
        config, stage, train = self.config, self.stage, self.stage.train
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        here = context.get_local_world_size()
        torch.set_num_threads(config.cluster.threads_per_worker or max(1, (os.cpu_count() or 1) // here))
        gpu = config.cluster.use_gpu
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        self.dtype = torch.bfloat16 if config.cluster.precision == "bf16" else torch.float32
        torch.manual_seed(config.seed)  # the same weights on every worker
        if gpu:
            check_memory(config, stage, torch.cuda.get_device_properties(self.device).total_memory / 2**30)
        self.model, self.processor, teacher = build(config, stage, self.dtype)
        shared = teacher is not None and assemble.same_tower(self.model, teacher, self.dtype)
        on_policy = train.method == "distill"
        align = align_map(config, self.model, teacher) if on_policy else None
        frozen = getattr(config, stage.role).model.freeze_tower or train.tuning != "full"
        tune(self.model, train.tuning, train.lora)
        if config.cluster.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        tokenizer, images = self.processor.tokenizer, self.processor.image_processor
        vocabulary = len(tokenizer)
        student = row_model(self.model, images, align, frozen, vocabulary).to(self.device).eval()
        frozen_teacher = None
        if teacher is not None:
            on_device = teacher if config.distill.teacher_bits else teacher.to(self.device)  # bitsandbytes has moved it
            frozen_teacher = row_model(on_device, images, vocabulary=vocabulary).eval().requires_grad_(False)
        folder = Path(stage.folder) / "tokenizer"
        if self.rank == 0:
            tokenizer.save_pretrained(folder)
        dist.barrier()
        self._read_images(student, frozen_teacher, str(folder))
        if frozen_teacher is not None and config.cluster.shard_teacher:
            engine.shard(frozen_teacher, config.cluster)

        self._choose_attention(student)

        # Every step runs the same number of backward passes on every worker: one per micro-batch, one more for D_PT.
        self.micros = train.images_per_step // (train.images_per_micro_batch * self.world)
        self.with_pretrain = on_policy and config.distill.loss.pretrain > 0
        self.passes = self.micros * (2 if self.with_pretrain else 1)
        self.engine = engine.start(student, train, config.cluster, self.passes)
        here = stage.name, self.rank, self.world, self.device
        self.checkpoints = Checkpoints(checkpoints_of(config, stage), job["identity"], *here, train.keep_checkpoints)
        self.resume = self.checkpoints.restore(self.engine)
        self.progress = self.resume.progress
        self.written: Experience | None = None  # by the last rollout
        self.teacher_in_shards = frozen_teacher if config.cluster.shard_teacher else None

        forbidden = assemble.forbidden_tokens(tokenizer, vocabulary).to(self.device)
        self.distiller = Distiller(
            student,
            frozen_teacher,
            config.distill.loss,
            forbidden,
            tokenizer.eos_token_id,
            train.max_response,
            shared,
            config.cluster.loss_chunk,
            fixed=False if config.cluster.zero_stage == 3 or config.cluster.shard_teacher else None,  # hooks cannot be recorded
        )

    def _read_images(self, student: RowModel, teacher: RowModel | None, tokenizer: str) -> None:
        """Make the packer, and let both models show that they read what it packs."""
        train, readers = self.stage.train, [student] if teacher is None else [student, teacher]
        side = assemble.image_side(self.model, self.config.image_size)
        with torch.no_grad():
            tokens = student.image_tokens(side)
        image_token = self.processor.tokenizer.convert_ids_to_tokens(student.image_token)
        features = "" if train.blind else self.config.features  # a blind stage is shown images of nothing
        if features:
            roles = (self.stage.role, "teacher")
            check_features(self.config, {role: reader.model for role, reader in zip(roles, readers, strict=False)}, side)
        sizes = tokens, side, train.max_response, train.questions_per_row
        self.spec = PackerSpec(
            tokenizer, image_token, *sizes, student.around(), tokens_per_row=train.tokens_per_row, features=features
        )
        self.packer = new_packer(self.spec)
        for reader in readers:
            reader.begin(self.packer.prefix, self.packer.prompt, side)
        if not all(reader.takes_rows for reader in readers):
            self.spec = replace(self.spec, questions_per_row=1, share_rows=False)
            self.packer = new_packer(self.spec)
        if self.rank == 0:
            rows = f"image rows of up to {self.spec.questions_per_row} questions an image"
            rows += f" and {self.spec.tokens_per_row} tokens" if self.spec.tokens_per_row else ""
            one = "one question a row: this family does not take the mask of image rows"
            print(f"[{self.stage.name}] {tokens} image tokens, {rows if self.spec.share_rows else one}", flush=True)

    def _choose_attention(self, student: RowModel) -> None:
        """As cluster.attention says; auto: what rank 0 measures, with a micro-batch of full rows, decides for all workers."""
        name, train = self.config.cluster.attention, self.stage.train
        told = f"cluster.attention={name}"
        if name == "auto":
            columns = len(self.packer.prefix) + self.spec.questions_per_row * len(self.packer.prompt)
            name, told = faster(student, train.images_per_micro_batch, columns)
            flex = torch.tensor(float(name == "flex"), device=self.device)
            dist.broadcast(flex, 0)
            name = "flex" if flex else "sdpa"
        student.attend_by(name)
        if self.rank == 0 and self.device.type == "cuda":
            print(f"[{self.stage.name}] attention of updates: {name} ({told})", flush=True)

    def stream(self, splits: list[str], seed: int):
        """This worker's micro-batches from the current step on."""
        return stream(self.config, splits, self.stage.train, self.spec, seed, self.rank, self.world, self.progress.step)

    def rows(self, batch: MicroBatch) -> tuple[Rows, Any]:
        """(rows, what the models take of the images) on the device; images of nothing for a blind stage."""
        rows = self.packer.pack(batch.questions).to(self.device)
        if batch.features is not None:
            return rows, Seen(to_tensor(batch.features).to(self.device))
        return rows, self.distiller.student.prepare(torch.from_numpy(batch.pixels).to(self.device), self.stage.train.blind)

    def need_on(self) -> None:
        """Raise Stopped, on all workers, once rank 0 has got the notice to stop (collective)."""
        told = self.rank == 0 and bool(ray.wait([self.notice], timeout=0)[0])
        stop = torch.tensor(float(told), device=self.device)
        dist.all_reduce(stop)
        if stop:
            raise Stopped

    def samples(self, count: int = 3) -> list[str]:
        """The first responses of this worker's last rollout, with their questions."""
        if self.written is None:
            return []
        asked = [question.text for row in self.written.rows.questions for question in row]
        responses = split(self.written.batch.token, self.written.batch.sequence)
        texts = [self.processor.tokenizer.decode(response) for response in responses[:count]]
        return [f"{question} -> {text}" for question, text in zip(asked, texts, strict=False)]

    def sampler(self, step: int, number: int) -> torch.Generator:
        """What samples the responses of this worker's micro-batch `number` of a step: the same whatever worker has it, and
        after a resume."""
        place = (step * self.micros + number) * self.world + self.rank
        return torch.Generator(self.device).manual_seed(mixed_seed(self.config.seed, place))

    def labelled(self, batch: MicroBatch, with_teacher: bool) -> Labelled:
        """A micro-batch of answers from the data."""
        rows, pixels = self.rows(batch)
        return self.distiller.labelled(rows, self.packer.answers(rows), pixels, with_teacher)

    def gathered(self) -> AbstractContextManager:
        """Inside: whole weights, and no dropout, for what runs outside an update (collective)."""
        self.engine.module.eval()
        return engine.gathered(self.engine, self.teacher_in_shards)

    def chunks(self, items: list[int]) -> int:
        """Chunks of the response tokens in every pass of a step where the student's weights lie in shards: all workers must fetch
        its head equally often (collective there). 0: they do not. items: tokens of each pass."""
        if self.engine.zero_optimization_stage() < 3:
            return 0
        agreed = torch.tensor(self.distiller.chunks(max(items)), device=self.device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)

    def export(self) -> None:
        """Write the student as plain transformers reads it (collective: ZeRO-3 gathers its weights layer by layer)."""
        weights = merged_weights(self.model, engine.whole, keep=self.rank == 0)
        if self.rank == 0:
            assemble.save(self.model, self.processor, Path(self.stage.folder) / "model", weights)


def worker(job: dict) -> dict[str, int]:
    """What Ray Train runs on every worker. job: {"config": Config, "stage": Stage, "identity": of its settings, "notice": [a
    reference that is ready once the run is told to stop]}. Returns {"step": updates made}, fewer than stage.train.steps where it
    was."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it tells of every report
    run = Run(job)
    train, progress = run.stage.train, run.progress
    batches = run.stream(train.splits, run.config.seed)
    corpus = run.stream(run.config.distill.pretrain_splits, run.config.seed + 10**6) if run.with_pretrain else iter(())
    validation = list(read_split(run.config, "val", run.spec, train.images_per_micro_batch, run.rank, run.world))
    exported = progress.step > 0 and (Path(run.stage.folder) / "model").exists()
    report = Reporter(run.config, run.stage, run.resume, run.rank, run.device)
    saved = progress.step

    for step in range(progress.step, train.steps):
        counted = report.state()
        try:
            one_step(run, batches, corpus, report, step)
        except Stopped:
            if saved < step:
                progress.seconds = report.seconds
                run.checkpoints.save(run.engine, progress, counted)
            break
        progress.step = done = step + 1
        last = done == train.steps
        if done % train.log_every == 0 or last:
            report.flush(done, {"learning_rate": learning_rate(train, step)})
            report.warn(run.samples)
        if done % train.validate_every == 0 or last:
            progress.last = validate(run, validation)
            row = {"step": done, "validation_loss": progress.last}
            report.write(row)
            ray.train.report(report.row | row)
            if not run.stage.keep_best or progress.last < progress.best or not exported:
                run.export()
                exported = True
            progress.best = min(progress.best, progress.last)
        if done % train.checkpoint_every == 0 or last:
            progress.seconds = report.seconds
            run.checkpoints.save(run.engine, progress, report.state())
            saved = done
    run.checkpoints.wait()
    report.close()
    return {"step": progress.step}


def one_step(run: Run, batches: Iterator[MicroBatch], corpus: Iterator[MicroBatch], report: Reporter, step: int) -> None:
    """The data of a step and its update. Raises Stopped, NotFinite."""
    train = run.stage.train
    for group in run.engine.optimizer.param_groups:
        group["lr"] = learning_rate(train, step)
    fetched = time.time()
    drawn = [next(batches) for _ in range(run.micros)]
    drawn_pretrain = [next(corpus) for _ in range(run.micros)] if run.with_pretrain else []
    report.waited += time.time() - fetched
    for batch in [*drawn, *drawn_pretrain]:
        report.reject(batch.rejected)
        report.saw(batch.ids)
    if train.method == "distill":
        update_on_policy(run, drawn, drawn_pretrain, report, step)
    else:
        update_labelled(run, drawn, report, step)


def update_on_policy(run: Run, drawn: list[MicroBatch], corpus: list[MicroBatch], report: Reporter, step: int) -> None:
    """One step of Table 1's loop: generate all responses of the step, count, then one backward per micro-batch."""
    loss, distiller = run.config.distill.loss, run.distiller
    items = []
    with run.gathered():
        for number, batch in enumerate(drawn):
            run.need_on()
            items.append(distiller.rollout(*run.rows(batch), run.sampler(step, number)))
        pretrain = [run.labelled(batch, with_teacher=loss.preset == "reference") for batch in corpus]
    report_padding(report, [*items, *pretrain])
    for item in items:
        branches, responses = float(item.rows.alive_Rn.sum()), split(item.batch.token, item.batch.sequence)
        sums = {"length": item.length * branches, "finished": item.finished * branches, "repetition": repetition(responses)}
        report.add({name: torch.tensor(value) for name, value in sums.items()}, branches)
    run.written = items[0]
    tokens, image_tokens, pretrain_tokens = global_counts(
        run,
        sum(len(i.batch.token) for i in items),
        sum(i.z_teacher[..., 0].numel() for i in items),
        sum(i.tokens for i in pretrain),
    )

    report.tokens += tokens
    chunks = run.chunks([*(len(i.batch.token) for i in items), *(i.tokens for i in pretrain)])

    def on_policy(item: Experience) -> Tensor:
        value, metrics = distiller.on_policy_pass(run.engine, item, tokens, image_tokens, chunks)
        if "align" in metrics:
            report.add({"align": metrics.pop("align")}, item.z_teacher[..., 0].numel())
        report.add(metrics, len(item.batch.token))
        return value

    def modelling(item: Labelled) -> Tensor:
        value, metrics = distiller.labelled_pass(run.engine, item, pretrain_tokens, "pretrain", chunks)
        report.add({"pretrain": metrics["cross_entropy"]}, item.tokens)
        return loss.pretrain * value

    for number in range(loss.updates_per_rollout):
        update(run, [*((on_policy, i) for i in items), *((modelling, i) for i in pretrain)], report, step, number)


def update_labelled(run: Run, drawn: list[MicroBatch], report: Reporter, step: int) -> None:
    """One step on the answers of the data: sft, or kd with the teacher's distribution."""
    method = run.stage.train.method
    with run.gathered():
        items = [run.labelled(batch, with_teacher=method == "kd") for batch in drawn]
    report_padding(report, items)
    (tokens,) = global_counts(run, sum(i.tokens for i in items))
    report.tokens += tokens
    chunks = run.chunks([i.tokens for i in items])

    def learn(item: Labelled) -> Tensor:
        value, metrics = run.distiller.labelled_pass(run.engine, item, tokens, method, chunks)
        report.add(metrics, item.tokens)
        return value

    update(run, [(learn, i) for i in items], report, step)


def report_padding(report: Reporter, items: Sequence[Experience | Labelled]) -> None:
    """The share of padding in what the updates read."""
    for item in items:
        columns = item.rows.ids_RP.numel() + item.responses.ids_RC.numel()
        report.add({"padding": torch.tensor(padding(item.rows, item.responses) * columns)}, columns)


def global_counts(run: Run, *counts: float) -> list[float]:
    """Sums over all workers (collective), at least 1."""
    total = torch.tensor(counts, dtype=torch.float64, device=run.device)
    dist.all_reduce(total)
    return [max(c, 1.0) for c in total.tolist()]


def update(run: Run, passes: list[tuple[Callable[..., Tensor], Any]], report: Reporter, step: int, reuse: int = 0) -> None:
    """One backward per pass, then one optimizer step, unless any worker's loss is not finite (collective).

    reuse: updates that this step has made before from the same rollout; behind the first one the step is not dropped.

    A pass returns its share of a loss that is divided by global counts already, so the averages that DeepSpeed takes over
    passes and workers are multiplied back. Raises NotFinite, Stopped.
    """
    total, norm = torch.zeros((), dtype=torch.float64, device=run.device), 0.0
    run.engine.module.train()
    with engine.whole(run.teacher_in_shards.head_weights() if run.teacher_in_shards is not None else []):
        for number, (make, item) in enumerate(passes):
            if reuse == 0:
                run.need_on()
            torch.manual_seed(mixed_seed(run.config.seed, step, number * run.world + run.rank))  # dropout follows from the step
            value = make(item)
            total += value.detach()
            run.engine.backward(value * (run.world * run.passes))
            if number == len(passes) - 1:
                dist.all_reduce(total)
                _need_finite(total.item(), "the loss", run, step)
                norm = engine.gradient_norm(run.engine)
            run.engine.step()
    if run.engine.zero_optimization_stage() > 0:
        norm = engine.gradient_norm(run.engine)
    _need_finite(norm, "the gradient norm", run, step)
    report.add({"loss": total, "grad_norm": torch.tensor(norm)}, 1)


def _need_finite(value: float, what: str, run: Run, step: int) -> None:
    if math.isfinite(value):
        return
    at, folder = run.progress.step, run.stage.folder
    kept = f"the checkpoint of step {at} is kept in {folder}/checkpoints" if at else "there is no checkpoint yet"
    raise NotFinite(
        f"[{run.stage.name}] {what} is not finite at step {step + 1}; {kept}. Lower learning_rate or max_grad_norm and run again"
    )


@torch.no_grad()
def validate(run: Run, batches: list[MicroBatch]) -> float:
    """Mean cross-entropy per response token on the validation split, over all workers (collective)."""
    total = torch.zeros(2, dtype=torch.float64)
    with run.gathered():
        for batch in batches:
            item = run.labelled(batch, with_teacher=False)
            value, _ = run.distiller.labelled_pass(
                run.distiller.student, item, 1.0, "sft"
            )  # whole weights: as many chunks as needed
            total += torch.tensor([value.item(), item.tokens], dtype=torch.float64)
    total = total.to(run.device)
    dist.all_reduce(total)
    return (total[0] / total[1].clamp(min=1)).item()
