"""The loop that every Ray Train worker runs: sft, kd and the on-policy loop of Table 1 alike. Read it top to bottom."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from geodistill.config import TrainConfig
from geodistill.data.files import exists, open_folder
from geodistill.data.rows import padding
from geodistill.data.stream import MicroBatch, read_split
from geodistill.distill.step import Experience, Labelled
from geodistill.train import engine
from geodistill.train.collapse import repetition, split
from geodistill.train.reporter import Reporter
from geodistill.train.run import Run, Stopped, mixed_seed


class NotFinite(RuntimeError):
    """Loss or gradient norm is NaN or infinite; the message says at which step and which checkpoint is left."""


def learning_rate(train: TrainConfig, step: int) -> float:
    """Cosine with linear warm-up; step counts from 0."""
    warm = max(1, round(train.warmup * train.steps))
    if step < warm:
        return train.learning_rate * (step + 1) / warm
    share = (step - warm) / max(1, train.steps - warm)
    low = train.final_learning_rate
    return train.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))


def worker(job: dict) -> dict[str, int]:
    """What Ray Train runs on every worker. job: {"config": Config, "stage": Stage, "identity": of its settings, "notice": [a
    reference that is ready once the run is told to stop]}. Returns {"step": updates made}, fewer than stage.train.steps where it
    was."""
    logging.getLogger("ray.train.v2._internal.execution.context").setLevel(logging.WARNING)  # it tells of every report
    run = Run(job)
    train, progress, distill, seed = run.stage.train, run.progress, run.config.distill, run.config.seed
    batches = run.stream(train.splits, seed)
    corpus = run.stream(distill.pretrain_splits, seed + 10**6, distill.pretrain_shards) if run.with_pretrain else iter(())
    validation = list(read_split(run.config, "val", run.spec, train.images_per_micro_batch, run.rank, run.world))
    exported = progress.step > 0 and exists(open_folder(run.stage.folder), "model/config.json")
    if not exported:  # no model that the best loss so far would belong to
        progress.best = math.inf
    report = Reporter(run.config, run.stage, run.resume, run.rank, run.device)

    for step in range(progress.step, train.steps):
        counted = report.state()
        try:
            one_step(run, batches, corpus, report, step)
        except Stopped:
            if run.checkpoints.newest < step:
                progress.seconds = report.seconds
                report.publish()
                run.checkpoints.save(run.engine, progress, counted)
            break
        except NotFinite:
            run.checkpoints.wait()  # the one on its way shall not be lost
            raise
        progress.step = done = step + 1
        last = done == train.steps
        if done % train.log_every == 0 or last:
            report.flush(done, {"learning_rate": learning_rate(train, step)})
            report.warn(run.samples)
        if done % train.validate_every == 0 or last:
            progress.last = validate(run, validation)
            row = {"step": done, "validation_loss": progress.last}
            report.write(row)
            report.publish()  # before what hears of it may end this process
            ray.train.report(report.row | row)
            if not run.stage.keep_best or progress.last < progress.best or not exported:
                run.export()
                exported = True
            progress.best = min(progress.best, progress.last)
        if run.will_lose_a_node() or done % train.checkpoint_every == 0 or last:
            progress.seconds = report.seconds
            report.publish()
            run.checkpoints.save(run.engine, progress, report.state())
    run.checkpoints.wait()
    if progress.step == train.steps and not exported:  # finished before: its folder was lost, its checkpoints lie elsewhere
        if run.rank == 0:
            print(f"[{run.stage.name}] its model was gone: it is made again from the last step's checkpoint", flush=True)
        run.export()
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
    share = 1 / run.world  # every worker has the same figures: together they count once
    report.add({"loss": total * share, "grad_norm": torch.tensor(norm * share, dtype=torch.float64)}, share)


def _need_finite(value: float, what: str, run: Run, step: int) -> None:
    if math.isfinite(value):
        return
    at, folder = run.checkpoints.newest, run.checkpoints.folder
    kept = f"the checkpoint of step {at} is kept in {folder}" if at else "there is no checkpoint yet"
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
