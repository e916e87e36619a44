"""ZeRO 3 in one process: a rollout gathers the student once, and buffers keep their precision."""

import copy

import pytest
import torch
from torch import nn

from geodistill.config import ClusterConfig, LossConfig, TrainConfig
from geodistill.data.stream import to_micro_batch
from geodistill.distill.step import Distiller
from geodistill.models.row_model import RowModel
from geodistill.train import engine


@pytest.fixture
def count(monkeypatch, alone):
    """How often the weights of a layer were asked for, and how often those of a whole model."""
    import deepspeed
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    found = {"layer": 0, "model": 0}
    fetch, gather = Coordinator.fetch_sub_module, deepspeed.zero.GatheredParameters

    def counted_fetch(*args, **given):
        found["layer"] += 1
        return fetch(*args, **given)

    def counted_gather(*args, **given):
        found["model"] += 1
        return gather(*args, **given)

    monkeypatch.setattr(Coordinator, "fetch_sub_module", counted_fetch)
    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", counted_gather)
    return found


def start(model: nn.Module, precision: str = "fp32", stage: int = 3):
    cluster = ClusterConfig(zero_stage=stage, precision=precision)
    return engine.start(model, TrainConfig(learning_rate=1e-3), cluster, passes=1), cluster


def test_a_rollout_gathers_each_model_once_and_an_update_layer_by_layer(
    count, teacher, student, make_packer, records, forbidden, end
):
    frozen = RowModel(copy.deepcopy(teacher)).eval().requires_grad_(False)
    learner = RowModel(copy.deepcopy(student), nn.Linear(32, 48, bias=False))
    names = {id(p): name for name, p in learner.named_parameters()}
    run, cluster = start(learner)
    engine.shard(frozen, cluster)
    assert all(p.numel() == 0 for p in frozen.parameters())
    assert any(p.numel() == 0 for p in learner.parameters()) and names
    distiller = Distiller(learner, frozen, LossConfig(), forbidden, end, 24, shared_tower=True)
    packer = make_packer(4)
    batch = to_micro_batch(records[:4], packer, 32)
    rows, pixels = packer.pack(batch.questions), learner.prepare(torch.from_numpy(batch.pixels))
    for step in range(2):
        before = dict(count)
        with engine.gathered(run, frozen):
            item = distiller.rollout(rows, pixels, torch.Generator().manual_seed(step))
        assert int(item.responses.step_RC.max()) > 3  # several tokens were written
        assert count == {"layer": before["layer"], "model": before["model"] + 2}
        assert all(p.numel() == 0 for p in frozen.parameters())
        with engine.whole(frozen.head_weights()):
            value, _ = distiller.on_policy_pass(run, item, len(item.batch.token), item.z_teacher[..., 0].numel(), chunks=3)
            run.backward(value)
        run.step()
        assert count["layer"] > before["layer"]
        assert engine.gradient_norm(run) > 0


@pytest.mark.parametrize("stage", [0, 1])
def test_the_first_bf16_update_is_adamws_first(alone, stage):
    """On float32 masters that nothing has touched before."""
    torch.manual_seed(0)
    module = nn.Linear(8, 8, bias=False)
    master = nn.Parameter(module.weight.detach().bfloat16().float())
    train = TrainConfig(learning_rate=0.1, weight_decay=0.5, max_grad_norm=0.0)
    run = engine.start(module, train, ClusterConfig(zero_stage=stage, precision="bf16"), passes=1)
    drawn = torch.randn(4, 8).bfloat16()
    run.backward(run(drawn).pow(2).sum().float())
    run.step()
    master.grad = torch.autograd.grad((drawn @ master.bfloat16().T).pow(2).sum().float(), master)[0]
    torch.optim.AdamW([master], lr=0.1, betas=(0.9, 0.98), weight_decay=0.5).step()
    assert torch.allclose(module.weight.float(), master.detach().bfloat16().float(), atol=0.01)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_bf16_leaves_rotary_frequencies_in_float32(alone, student, stage):
    learner = RowModel(copy.deepcopy(student))
    exact = learner.model.model.language_model.rotary_emb.inv_freq.clone()
    start(learner, "bf16", stage)
    assert learner.model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(learner.model.model.language_model.rotary_emb.inv_freq, exact)
