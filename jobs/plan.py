"""Does a run fit its GPUs, and how long does it take? Memory by part, time, and the sizes of the models. Trains nothing."""

from geodistill.cli import JobFailed, main
from geodistill.config import Config
from geodistill.train.stage import Stage, stages


def plan_job(config: Config) -> None:
    """Print it. Raises JobFailed, with what would help, where a stage does not fit the planned card."""
    from geodistill.evaluate.tables import tables
    from geodistill.models.cost import size
    from geodistill.train.plan import available, models, verdict

    todo = stages(config, "distill")
    used = models(config, todo[0])
    for role, (folder, _) in used.items():
        print(f"{role}: {folder or 'no folder yet, so of the sizes in the settings'}")
    if not config.cluster.use_gpu:
        print("cluster.use_gpu=false: memory is that of a worker on the CPU, time that on plan.gpu")
    print(*(memory_text(config, stage) for stage in todo), time_text(config, todo), sep="\n\n", end="\n\n")
    print(scaling_text(config, todo[-1]), end="\n\n")
    print(tables({}, {role: size(made) for role, (_, made) in used.items()})[-1].text(), end="\n\n")
    found = [verdict(config, stage, available(config), config.plan.gpu) for stage in todo]
    for fits, words in found:
        if fits:
            print(words)
    if not all(fits for fits, _ in found):
        raise JobFailed("\n".join(words for fits, words in found if not fits))


def memory_text(config: Config, stage: Stage) -> str:
    """A column for each moment that may be the peak."""
    from geodistill.evaluate.tables import ABSENT, Table
    from geodistill.train.plan import GIB, memory

    moments = memory(config, stage)

    def cells(values: list[float]) -> list[str]:
        return [text for v in values for text in ((f"{v:,.0f}", f"{v / GIB:.2f}") if v else (ABSENT, ABSENT))]

    names = dict.fromkeys(name for parts in moments.values() for name, value in parts.items() if value)
    rows = [[name, *cells([parts.get(name, 0.0) for parts in moments.values()])] for name in names]
    rows.append(["all", *cells([sum(parts.values()) for parts in moments.values()])])
    columns = [(moment, unit) for moment in moments for unit in ("bytes", "GiB")]
    note = f"{config.plan.reserve:g} GiB more are reserved for CUDA, communication and fragmentation."
    return Table(f"Memory of one worker: {stage.name}", columns, rows, note, label="part").text()


def time_text(config: Config, todo: list[Stage]) -> str:
    """A column for each stage: the parts of a step, and what follows from them."""
    from geodistill.evaluate.tables import ABSENT, Table
    from geodistill.train.plan import load_of, shapes, work

    workers, plan, rows, total = config.cluster.workers, config.plan, {}, 0.0
    for stage in todo:
        cost, load = work(config, stage), load_of(config, stage, shapes(config, stage)[1].patches)
        seconds = {f"{part}, s": value.seconds(config) for part, value in cost.items()}
        step, images = sum(seconds.values()), stage.train.images_per_step
        hours = stage.train.steps * step / 3600
        total += hours
        tokens, decode = workers * load.micros * load.responses, seconds["decode, s"]
        column = seconds | {
            "a step, s": step,
            "TFLOPs an image": workers * sum(value.flops for value in cost.values()) / images / 1e12,
            "images/s, all workers": images / step,
            "tokens/s in decoding, all workers": tokens / decode if decode else None,
            "steps": stage.train.steps,
            "hours": hours,
            "GPU-hours": hours * workers,
        }
        for name, value in column.items():
            rows.setdefault(name, [name]).append(f"{value:.4g}" if value else ABSENT)
    note = (
        f"{workers} x {plan.gpu}, {config.cluster.precision}, at {plan.matmul_share:.0%} of its FLOP rate and "
        f"{plan.bandwidth_share:.0%} of its bandwidth. Without reading data, validation, checkpoints and AdamW itself. "
        f"All stages: {total:.4g} hours, {total * workers:.4g} GPU-hours."
    )
    return Table("Time of a step", [("", stage.name) for stage in todo], [*rows.values()], note, label="").text()


def scaling_text(config: Config, stage: Stage) -> str:
    """A column for each number of workers: the parts of a step, what is prepared beside it, and what follows."""
    from geodistill.evaluate.tables import ABSENT, Table
    from geodistill.train.plan import load_of
    from geodistill.train.scaling import MOST, WORKERS, rates, scaled, starving

    found, load, plan = rates(config, stage), load_of(config, stage, 0), config.plan
    whole = stage.train.images_per_step // load.images  # micro-batches of the global batch
    few = sorted({workers for workers in (*WORKERS, whole) if whole % workers == 0 and workers > 1})
    cases = [("every worker as much", n, load.micros) for n in (1, *WORKERS)]
    cases += [(f"{stage.train.images_per_step} images a step", n, whole // n) for n in few]
    rows: dict[str, list[str]] = {}
    for _, workers, micros in cases:
        step, alone = scaled(config, stage, found, workers, micros), scaled(config, stage, found, 1, micros)
        column = {f"{part}, s": value for part, value in step.parts.items()} | {
            "a step, s": step.seconds,
            **{f"beside it: {part}, s": value for part, value in step.data.items()},
            "images a step": step.images,
            "images/s": step.rate,
            "responses/s": step.rate * load.rows * load.questions / load.images,
            "efficiency": step.rate / (workers * alone.rate),
        }
        for name, value in column.items():
            rows.setdefault(name, [name]).append(f"{value:.4g}" if value else ABSENT)
        rows.setdefault("bound by", ["bound by"]).append(step.bound)
    starved = starving(config, stage, found, load.micros)
    hungry = f"not even at {MOST:,} workers" if starved is None else f"from {starved:,} worker{'s' * (starved > 1)} on"
    note = (
        f"Compute: {found.source}. Nodes of {plan.workers_per_node} workers and {plan.node_cores} cores. All-reduce at "
        f"{found.link:.3g} GB/s in a node, {plan.bandwidth_share:.0%} of {plan.node_network:g} GB/s between nodes. Data of a "
        f"node: {1000 * found.decode:.2g} CPU ms an image, {found.store:.3g} GB/s of pixels through the object store; storage: "
        f"{found.image / 1000:.0f} kB an image, {plan.storage:g} GB/s for all nodes. Responses of {load.tokens} tokens on "
        f"average, {stage.train.max_response} at most. Efficiency: against one worker with as much. A step of every worker as "
        f"much would wait for data {hungry} (powers of two were tried)."
    )
    return Table(f"Scaling: {stage.name}", [(group, f"{n}") for group, n, _ in cases], [*rows.values()], note, "workers").text()


if __name__ == "__main__":
    main("plan", plan_job, needs_ray=lambda config: False)
