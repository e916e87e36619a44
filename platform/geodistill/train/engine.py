"""DeepSpeed: from the settings to an engine around the student, ZeRO 0-2, on GPUs or on the CPU."""

import logging
import os

import torch
from torch import nn

from geodistill.config import ClusterConfig, TrainConfig


def start(module: nn.Module, train: TrainConfig, cluster: ClusterConfig, passes: int):
    """A DeepSpeed engine over the trainable parameters of `module`; torch.distributed must be up.

    passes: backward passes of one step and worker (DeepSpeed's gradient accumulation). `engine.backward` divides by it and
    the reduction averages over workers: a caller who wants a sum multiplies its loss by both.
    """
    if not cluster.use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not cluster.use_gpu:  # its shared-memory reduction would be compiled for half a minute; gloo serves as well
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=train.learning_rate, betas=(0.9, 0.98), weight_decay=train.weight_decay, fused=cluster.use_gpu
    )
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": cluster.zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": cluster.precision == "bf16"},
        "steps_per_print": 10**9,
    }
    if cluster.precision == "bf16" and cluster.zero_stage > 0:  # DeepSpeed refuses it without ZeRO
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, model_parameters=parameters, config=settings)
    return engine


def gradient_norm(engine) -> float:
    """L2 norm of the reduced gradient. Without ZeRO it is taken before the step, from the gradients; with ZeRO after it."""
    if engine.zero_optimization_stage() > 0:
        return float(engine.get_global_grad_norm() or 0.0)
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
