"""A wrong config is refused early, with the key and the remedy."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from geodistill import cli, config
from geodistill.config import Config, ConfigError, changed, keys, load
from geodistill.rules import need_source

ROOT = Path(__file__).parents[2]


def test_defaults_are_valid():
    config.validate(Config(), config.search_space(Config().sweep.space))
    assert load(None).distill.teacher == "runs/default/teacher/model"


def test_file_then_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("run: here\nseed: 3\ndistill:\n  loss:\n    alpha: 0.5\n")
    settings = load(str(file), ["seed=4"])
    assert (settings.run, settings.seed, settings.distill.loss.alpha) == ("here", 4, 0.5)
    assert settings.data.shards == "here/data"


def test_an_empty_value_is_an_empty_text():
    assert load(str(ROOT / "configs/demo.yaml"), ["student.model.tower=", "run=a=b"]).student.model.tower == ""


def test_a_contradiction_in_a_variant_is_told_before_the_first_is_trained():
    check = runpy.run_path(str(ROOT / "jobs/ablation.py"))["check_variants"]
    check(load(None, []))
    with pytest.raises(ConfigError, match=r"ablation: 'x': distill\.loss\.preset=seqkd"):
        check(load(None, ["ablation={full: [], x: [distill.loss.preset=seqkd]}"]))


def test_saved_config_loads_again(tmp_path):
    settings = load(None, ["run=there", "student.model.hidden=64", "distill.train.splits=[train,unlabelled]"])
    (tmp_path / "resolved.yaml").write_text(config.as_yaml(settings))
    assert load(str(tmp_path / "resolved.yaml")) == settings


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_are_valid_and_name_what_is_there(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = load(str(file), ["data.root=here"])
    for model in (settings.teacher.model, settings.student.model):
        for folder in (model.init, model.tower):
            assert not folder or folder.startswith(settings.run) or (Path(folder) / "config.json").is_file(), folder


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("distill.loss.alhpa=0.3", ["distill.loss.alhpa", "distill.loss.alpha"]),
        ("nonsense=1", ["nonsense"]),
        ("seed=many", ["seed", "int"]),
        ("distill.loss.alpha=high", ["distill.loss.alpha", "float"]),
        ("cluster.use_gpu=perhaps", ["cluster.use_gpu", "bool"]),
        ("distill.loss=3", ["distill.loss"]),
        ("data=[1]", ["data"]),
        ("seed", ["seed", "key=value"]),
    ],
)
def test_unknown_key_or_wrong_type(override, names):
    with pytest.raises(ConfigError) as error:
        load(None, [override])
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["role=pupil"], ["role", "student"]),
        (["data.val_fraction=0.6", "data.test_fraction=0.5"], ["data.val_fraction", "data.test_fraction"]),
        (["data.images_per_shard=100"], ["data.images_per_shard", "data.images_per_group"]),
        (["data.max_rejected=2"], ["data.max_rejected"]),
        (["distill.train.tokens_per_row=60"], ["distill.train.tokens_per_row=60", "distill.train.max_response=64"]),
        (["student.model.hidden=90"], ["student.model.hidden", "student.model.heads"]),
        (["teacher.model.hidden=36", "teacher.model.heads=4"], ["teacher.model.hidden", "teacher.model.heads"]),
        (["student.model.vision.patch=7"], ["student.model.vision.image_size", "student.model.vision.patch"]),
        (["distill.loss.preset=mine"], ["distill.loss.preset", "reference"]),
        (["distill.loss.preset=seqkd"], ["distill.loss.alpha=0.2", "distill.loss.alpha=1"]),
        (["distill.loss.gkd_beta=2"], ["distill.loss.gkd_beta=2", "between 0 and 1"]),
        (["distill.loss.alpha=1.5"], ["distill.loss.alpha"]),
        (["distill.loss.temperature=0"], ["distill.loss.temperature"]),
        (["distill.loss.updates_per_rollout=0"], ["distill.loss.updates_per_rollout"]),
        (
            ["distill.loss.preset=reference", "distill.loss.importance=sequence"],
            ["distill.loss.preset", "distill.loss.importance"],
        ),
        (["distill.warm_start.splits=[unlabelled]"], ["distill.warm_start.splits", "distill.warm_start.method"]),
        (["distill.train.splits=[]"], ["distill.train.splits"]),
        (["distill.train.splits=[test]"], ["distill.train.splits", "unlabelled"]),
        (["student.train.images_per_step=24"], ["student.train.images_per_step", "images_per_micro_batch", "cluster.workers"]),
        (["cluster.workers=3"], ["images_per_step", "cluster.workers"]),
        (["data.images_per_group=32"], ["images_per_micro_batch", "data.images_per_group"]),
        (["cluster.zero_stage=4"], ["cluster.zero_stage"]),
        (["cluster.workers=0"], ["cluster.workers"]),
        (["cluster.precision=fp16"], ["cluster.precision", "bf16"]),
        (["teacher.train.method=kd"], ["teacher.train.method"]),
        (["student.train.method=distill"], ["student.train.method"]),
        (["distill.warm_start.method=distill"], ["distill.warm_start.method", "distill.train"]),
        (["distill.train.warmup=1"], ["distill.train.warmup"]),
        (["distill.train.steps=-1"], ["distill.train.steps"]),
    ],
)
def test_contradictions_name_their_keys(overrides, names):
    with pytest.raises(ConfigError) as error:
        load(None, overrides)
    assert all(name in str(error.value) for name in names), error.value


def test_what_is_read_is_asked_for_where_it_is_read():
    """prepare, and the pipeline, need raw data; other jobs read shards."""
    for overrides, name in ((["data.source=llava"], "data.root"), (["data.source=llava", "data.root=/x"], "data.annotations")):
        with pytest.raises(ConfigError, match=name):
            need_source(load(None, overrides))
    need_source(load(None, ["data.source=dota", "data.root=/x"]))


def test_a_file_builds_on_another(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "first.yaml").write_text("run: a\nseed: 3\nstudent: {train: &t {steps: 7, warmup: 0.5}}\ndistill: {train: *t}\n")
    (tmp_path / "deep/second.yaml").write_text("base: ../first.yaml\nrun: b\nstudent: {train: {steps: 8}}\n")
    (tmp_path / "third.yaml").write_text(f"base: {tmp_path}/deep/second.yaml\nevaluate: {{models: {{mine: m}}}}\n")
    found = load(str(tmp_path / "third.yaml"), ["seed=4"])
    assert (found.run, found.seed, found.student.train.steps, found.student.train.warmup, found.distill.train.steps) == (
        "b", 4, 8, 0.5, 7,
    )  # fmt: skip
    assert found.evaluate.models == {"mine": "m"} and found.distill.teacher == "b/teacher/model"
    (tmp_path / "first.yaml").write_text(f"base: {tmp_path}/third.yaml\n")
    with pytest.raises(ConfigError, match="does not build on this one"):
        load(str(tmp_path / "third.yaml"))
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        (tmp_path / "first.yaml").write_text("base: nowhere.yaml\n")
        load(str(tmp_path / "first.yaml"))


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "seed: 1\nseed: 2\n"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load(str(file), ["data.root=/data"])


def test_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load("nowhere.yaml")


def test_command_line(capsys):
    for arguments, code in ((["--help"], 0), ([], 2), (["--config"], 2), (["--config", "nowhere.yaml"], 2)):
        with pytest.raises(SystemExit) as leave:
            cli.settings("distill", arguments)
        assert leave.value.code == code
    assert "distill.loss.alpha" in capsys.readouterr().out


def test_every_key_is_explained():
    assert all(meaning for *_, meaning in keys())


def test_config_needs_neither_torch_nor_ray():
    code = "import sys, geodistill.config; print([m for m in ('torch', 'ray', 'transformers', 'deepspeed') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "platform")
    assert out.stdout.strip() == "[]"


def test_submitted_jobs_get_the_environment_of_local_ones():
    from geodistill.cluster import ENVIRONMENT

    assert OmegaConf.load(ROOT / "runtime-env.yaml").env_vars == {"PYTHONPATH": "platform", **ENVIRONMENT}


def test_platform_is_no_package():
    """It would shadow Python's own `platform` module, and torch and ray with it."""
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_a_list_of_models_replaces_the_one_before_and_a_single_key_adds(tmp_path):
    (tmp_path / "c.yaml").write_text("evaluate: {models: {mine: a}}\nablation: {full: [], x: [seed=1]}\n")
    file = str(tmp_path / "c.yaml")
    assert list(load(None).evaluate.models) == ["teacher", "baseline", "distilled"]
    assert load(file).evaluate.models == {"mine": "a"} and list(load(file).ablation) == ["full", "x"]
    assert load(file, ["evaluate.models={yours: b}"]).evaluate.models == {"yours": "b"}
    assert load(file, ["evaluate.models.yours=b"]).evaluate.models == {"mine": "a", "yours": "b"}
    assert load(None, ["evaluate.models.yours=b"]).evaluate.models.keys() > {"teacher", "yours"}


def test_changed_settings_are_checked_too():
    config = load(None, ["run=r"])
    assert changed(config, ["distill.loss.alpha=0.5"]).distill.loss.alpha == 0.5 and config.distill.loss.alpha == 0.2
    with pytest.raises(ConfigError, match="alpha=2"):
        changed(config, ["distill.loss.alpha=2"])
    with pytest.raises(ConfigError, match="unknown key"):
        changed(config, ["distill.loss.alhpa=0.5"])


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.bands=[1,", "cannot be read"),
        ("data.bands=[0]", "bands count from 1"),
        ("evaluate.models={}", "evaluate.models is empty"),
        ("data.tile=100", "data.tile_overlap=100 must be less than data.tile=100"),
        ("data.min_visible=3", "data.min_visible=3.0 must lie above 0"),
        ("evaluate.images_per_batch=0", "evaluate.images_per_batch must be at least 1"),
    ],
)
def test_settings_that_would_fail_later_are_refused_now(override, message):
    with pytest.raises(ConfigError, match=message):
        load(None, [override])


def test_the_shipped_serve_config_fits_the_application():
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from serving.app import Settings

    found = yaml.safe_load((Path(__file__).parents[2] / "serving/serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(found)
    (application,) = schema.applications
    assert application.import_path == "serving.app:build" and Settings(**application.args).replicas == 1
    assert schema.http_options.host == "127.0.0.1"
