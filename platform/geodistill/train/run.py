"""What a Ray Train worker has: models, engine, checkpoints and data, made once. loop.py runs it."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from torch import nn

from geodistill.config import Config
from geodistill.data.features import check_features, to_tensor
from geodistill.data.files import written
from geodistill.data.rows import Rows
from geodistill.data.stream import MicroBatch, PackerSpec, new_packer, stream
from geodistill.distill.step import Distiller, Experience, Labelled, Seen
from geodistill.models import assemble
from geodistill.models.attention import faster
from geodistill.models.row_model import RowModel, row_model
from geodistill.models.tuning import merged_weights, tune
from geodistill.train import engine
from geodistill.train.checkpoint import Checkpoints
from geodistill.train.collapse import split
from geodistill.train.plan import check_memory
from geodistill.train.stage import Stage, checkpoints_of, on_shards


class Stopped(Exception):
    """The run was told to stop in the middle of a step, which is dropped: its weights are still those of the step before."""


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
        tokenizer = assemble.load_tokenizer(brings or f"{config.data.shards}/tokenizer")
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
        folder = f"{stage.folder}/tokenizer"
        if self.rank == 0:
            with written(folder) as here_written:
                tokenizer.save_pretrained(here_written)
        dist.barrier()
        self._read_images(student, frozen_teacher, folder)
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
        self.noticed = False
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
        side = assemble.image_side(self.model.config, self.config.image_size)
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

    def stream(self, splits: list[str], seed: int, shards: str = "") -> Iterator[MicroBatch]:
        """This worker's micro-batches from the current step on. shards: of which prepared data; "" = data.shards."""
        config, at = on_shards(self.config, shards), self.progress.step
        return stream(config, splits, self.stage.train, self.spec, seed, self.rank, self.world, at)

    def rows(self, batch: MicroBatch) -> tuple[Rows, Any]:
        """(rows, what the models take of the images) on the device; images of nothing for a blind stage."""
        rows = self.packer.pack(batch.questions).to(self.device)
        if batch.features is not None:
            return rows, Seen(to_tensor(batch.features).to(self.device))
        return rows, self.distiller.student.prepare(torch.from_numpy(batch.pixels).to(self.device), self.stage.train.blind)

    def need_on(self) -> None:
        """Raise Stopped, on all workers, once rank 0 has got the notice to stop, and CheckpointFailed once any worker could not
        write its part of a checkpoint (collective)."""
        told = self.rank == 0 and bool(ray.wait([self.notice], timeout=0)[0])
        stop = torch.tensor([told, self.checkpoints.failed], dtype=torch.float32, device=self.device)
        dist.all_reduce(stop)
        if stop[1]:
            self.checkpoints.wait()
        if stop[0]:
            raise Stopped

    def will_lose_a_node(self) -> bool:
        """Has a node of this run got notice, and is this the first that is told of it? (collective)"""
        before, self.noticed = self.noticed, ray.train.get_preemption_info() is not None
        return self.noticed and not before

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
            assemble.save(self.model, self.processor, f"{self.stage.folder}/model", weights)
