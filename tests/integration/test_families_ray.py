"""A model that is no LLaVA through the jobs' own code: Ray Train, DeepSpeed, LoRA, evaluation."""

import pytest
from families import save_pair
from tiny import history, settings, train

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.mark.long
def test_qwen_distils_into_qwen_and_is_evaluated(first, tmp_path):
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.models import assemble

    folders = save_pair("qwen2_5_vl", assemble.load_tokenizer(f"{first.data.shards}/tokenizer"), tmp_path)
    run = tmp_path / "run"
    config = settings(run, f"distill.teacher={folders['teacher']}", f"student.model.init={folders['student']}", "image_size=56",
                      f"data.shards={first.data.shards}", "distill.warm_start.tuning=lora", "distill.warm_start.lora.rank=4",
                      f"evaluate.models={{teacher: {folders['teacher']}, distilled: {run}/distill/model}}",
                      "evaluate.max_response=8")  # fmt: skip
    train(config, "distill")
    for stage in ("distill/warm", "distill"):
        assert sum("loss" in row for row in history(run / stage)) == 3
    scores = evaluate(config)
    assert 0 <= scores["distilled"]["summary"]["mean"] <= 100
