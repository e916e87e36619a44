"""DeepSpeed: from the settings to an engine around the student, ZeRO 0-3, on GPUs or on the CPU; a teacher in shards."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from geodistill.config import ClusterConfig, TrainConfig


def start(module: nn.Module, train: TrainConfig, cluster: ClusterConfig, passes: int):
    """A DeepSpeed engine over the trainable parameters of `module`; torch.distributed must be up.

    passes: backward passes of one step and worker (DeepSpeed's gradient accumulation). `engine.backward` divides by it and
    the reduction averages over workers: a caller who wants a sum multiplies its loss by both.
    """
    deepspeed = _deepspeed(cluster)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=train.learning_rate, betas=(0.9, 0.98), weight_decay=train.weight_decay, fused=cluster.use_gpu
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": _zero(module, cluster.zero_stage),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": cluster.precision == "bf16"},
        "steps_per_print": 10**9,
    }
    if cluster.precision == "bf16" and cluster.zero_stage > 0:  # DeepSpeed refuses it without ZeRO
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    # DeepSpeed casts buffers too: rotary frequencies of 8 bits of mantissa would misplace every token past the first hundreds
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, model_parameters=parameters, config=settings)
    if cluster.precision == "bf16" and cluster.zero_stage == 0:  # DeepSpeed's optimizer of this kind has made a step already
        engine.basic_optimizer.state.clear()
        for masters, weights in zip(engine.optimizer.fp32_groups, engine.optimizer.fp16_groups, strict=True):
            for master, weight in zip(masters, weights, strict=True):
                master.data.copy_(weight)  # it was decayed
    for name, value in buffers.items():
        owner, _, last = name.rpartition(".")
        module.get_submodule(owner)._buffers[last] = value.to(engine.device)
    return engine


def _deepspeed(cluster: ClusterConfig):
    """The module deepspeed, imported for the device that is used."""
    if not cluster.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not cluster.use_gpu:  # its shared-memory reduction would be compiled for half a minute; gloo serves as well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _zero(module: nn.Module, stage: int) -> dict:
    """ZeRO settings. Stage 3 leaves parameters whole that are smaller than a thousandth of the model (norms)."""
    if stage < 3:
        return {"stage": stage}
    whole = min(100_000, sum(p.numel() for p in module.parameters()) // 1000)
    return {"stage": 3, "stage3_param_persistence_threshold": whole}


def shard(module: nn.Module, cluster: ClusterConfig) -> None:
    """Leave each worker its part of every weight of the frozen `module`, in place; `whole` brings them together for a while."""
    _deepspeed(cluster).zero.Init(
        module=module,
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}},
        dtype=next(module.parameters()).dtype,
    )


def whole(parameters: Sequence[nn.Parameter]) -> AbstractContextManager:
    """A context inside which those of `parameters` that are in shards are whole, to be read (collective)."""
    # small ones that DeepSpeed keeps whole stay so: gathering would end with their being let go of
    known: list = [p for p in parameters if hasattr(p, "ds_id")]
    in_shards = [p for p in known if not (p.ds_persist and p.ds_status.name == "AVAILABLE")]
    if not in_shards:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(in_shards)


@contextmanager
def gathered(engine, teacher: nn.Module | None = None) -> Iterator[None]:
    """Inside: all weights of the student, and of a teacher in shards, are whole on every worker, and stay so (collective).

    For a rollout: its hundreds of small forward passes would otherwise each fetch every layer. Nothing is copied where the
    weights are whole anyway.
    """
    with whole([*teacher.parameters()] if teacher is not None else []):
        if engine.zero_optimization_stage() < 3:
            yield
            return
        offload = engine.optimizer.parameter_offload
        with whole([*engine.module.parameters()]):
            offload.destroy()  # its hooks: they would let go of each layer after its use, and talk to the other workers
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()


def gradient_norm(engine) -> float:
    """L2 norm of the reduced gradient. Without ZeRO it is taken before the step, from the gradients; with ZeRO after it."""
    if engine.zero_optimization_stage() > 0:
        return float(engine.get_global_grad_norm() or 0.0)
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()


MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each weight


def trainable(engine) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, in the module's order."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def read_state(engine, parameter: nn.Parameter) -> dict[str, Tensor]:
    """{"weight", *MOMENTS} of one parameter, whole and in float32, whatever the ZeRO stage (collective).

    A moment is missing where no step was made yet.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole_one = _held_whole(engine, parameter)
    if whole_one is not None:
        kept = engine.basic_optimizer.state.get(whole_one, {})
        return {"weight": whole_one.detach(), **{moment: kept[moment] for moment in MOMENTS if moment in kept}}
    found = {"weight": safe_get_full_fp32_param(parameter)}
    if steps_of(engine):
        found |= {moment: safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
    return found


def write_state(engine, parameter: nn.Parameter, state: dict[str, Tensor]) -> None:
    """Set what `read_state` gives, the weight that the model computes with included (collective; alike on every worker).

    Its moments only after `begin_moments`.
    """
    whole_one = _held_whole(engine, parameter)
    with torch.no_grad():
        if whole_one is not None:
            whole_one.copy_(state["weight"])
            for moment in MOMENTS:
                if moment in state:
                    engine.basic_optimizer.state[whole_one][moment].copy_(state[moment])
        else:
            for key, value in state.items():
                _write_part(parameter, value.to(engine.device).float(), None if key == "weight" else key)
        if engine.zero_optimization_stage() < 3:
            parameter.copy_(state["weight"])
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(state["weight"])


def steps_of(engine) -> float:
    """AdamW's own count of steps, that of its bias correction; 0 before the first."""
    for flat in _flat_parameters(engine):
        if "step" in engine.basic_optimizer.state.get(flat, {}):
            return float(engine.basic_optimizer.state[flat]["step"])
    return 0.0


def begin_moments(engine, steps: float) -> None:
    """Make AdamW's moments, zero, with `steps` steps counted: it makes them in its first step, too late for a resume."""
    optimizer = engine.basic_optimizer
    for flat in _flat_parameters(engine):
        fused = engine.device.type == "cuda"  # torch wants the count of a fused optimizer beside its parameters
        count = torch.tensor(steps, dtype=torch.float32, device=flat.device if fused else "cpu")
        optimizer.state[flat] = {"step": count, **{moment: torch.zeros_like(flat.detach()) for moment in MOMENTS}}
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)  # ZeRO 1 and 2 find parts through it
    if link is not None:
        engine.optimizer._hp_optimizer_states_linked = False
        link()


def _flat_parameters(engine) -> list[Tensor]:
    """The tensors that AdamW works on: a worker's flat parts with ZeRO, else one a parameter."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in engine.basic_optimizer.param_groups for p in group["params"]]


def _held_whole(engine, parameter: nn.Parameter) -> Tensor | None:
    """Without ZeRO: the float32 tensor that AdamW works on for `parameter`; None with ZeRO."""
    if engine.zero_optimization_stage() > 0:
        return None
    if engine.optimizer is engine.basic_optimizer:
        return parameter
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return next(exact for low, high in pairs for one, exact in zip(low, high, strict=True) if one is parameter)


def _write_part(parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
    """Set this worker's part of a float32 weight, or of one of its moments, from the whole."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):  # ZeRO 1 and 2
        if moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        return
    if moment is None:
        held = utils.safe_get_local_fp32_param(parameter)
    else:
        held = utils.safe_get_local_optimizer_state(parameter, moment)
    first = held.numel() * dist.get_rank()  # DeepSpeed's own setter does not know that the last part may be padded
    mine = value.flatten()[first : first + held.numel()]
    held.copy_(nn.functional.pad(mine, (0, held.numel() - mine.numel())).reshape(held.shape))
