"""Every setting of every job, typed. Imports neither torch nor ray: a wrong config is refused in under a second.

`load(file, overrides)` reads YAML over the defaults below, then `key=value` overrides, then `validate`s. A file may begin with
`base: OTHER.yaml` (beside it, or absolute): its keys then lie over those of the other.
"""

import difflib
import os
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from geodistill.language import GROUNDING, SYSTEM
from geodistill.rules import GPUS, SOURCE_NAMES, TUNING, ConfigError, validate


def option(default: Any, meaning: str, unit: str = "") -> Any:
    """A dataclass field with the text that `--help` prints."""
    return field(default=default, metadata={"help": meaning, "unit": unit})


def section(kind: Callable[[], Any], meaning: str) -> Any:
    """A nested group of settings."""
    return field(default_factory=kind, metadata={"help": meaning, "unit": ""})


@dataclass
class DataConfig:
    source: str = option("synthetic", f"which reader makes the records: {', '.join(SOURCE_NAMES)}")
    root: str = option("", "folder of the raw data set (not for synthetic); local or s3://", "path")
    sensor: str = option("optical", "sensor of its images: optical, sar, infrared; the latter two are named before each question")
    bands: list[int] = field(
        default_factory=list,
        metadata={"help": "bands to show of images that are not 8-bit pictures, from 1; []: the first three, or one", "unit": ""},
    )
    tile: int = option(0, "detection: side of the square tiles that larger images are cut into; 0: never", "pixels")
    tile_overlap: int = option(100, "detection: what neighbouring tiles share", "pixels")
    min_visible: float = option(0.5, "detection: an object cut by a tile is kept from this share of its area", "0-1")
    horizontal: bool = option(False, "detection: horizontal boxes in place of oriented ones")
    angle_counter_clockwise: bool = option(
        True, "detection sets, geochat_bench: is theta counter-clockwise in the box text that is written?"
    )
    max_boxes: int = option(20, "detection: most boxes in one answer; a kind with more is not asked for", "boxes")
    annotations: str = option(
        "", "llava, coco, captions: the JSON file; class_folders: captions and questions; absolute or below root", "path"
    )
    shards: str = option("${run}/data", "where prepare writes shards and the others read them", "path")
    train: int = option(1920, "labelled training images (synthetic)", "images")
    unlabelled: int = option(0, "training images whose answers are hidden (synthetic)", "images")
    val: int = option(160, "validation images (synthetic)", "images")
    test: int = option(320, "test images (synthetic)", "images")
    unlabelled_fraction: float = option(0.0, "share of the training images whose answers are hidden", "0-1")
    val_fraction: float = option(0.05, "share of the images for validation (not synthetic)", "0-1")
    test_fraction: float = option(0.2, "share of the images for the test (not synthetic)", "0-1")
    images_per_shard: int = option(512, "images in one Parquet file", "images")
    images_per_group: int = option(8, "images in one Parquet row group, the unit of reading and of the shuffle", "images")
    max_rejected: float = option(0.1, "share of bad records past which prepare fails", "0-1")
    vocabulary: int = option(
        1024, "size of the tokenizer made from the training text, where teacher.model.init brings none", "tokens"
    )
    duplicates: str = option(
        "report", "images that are in training and held out as well: report | remove (from training, and from validation)"
    )
    duplicate_bits: int = option(
        4, "bits of 64 in which the perceptual hashes of two copies may differ; -1: exact copies only", "bits"
    )
    name: str = option("", "name of the data set in tables; empty: the last part of data.root, or data.source")
    seed: int = option(0, "seed of the synthetic scenes and of the split (kept apart from the run's seed)")


@dataclass
class VisionConfig:
    hidden: int = option(128, "width of the CLIP tower", "features")
    layers: int = option(5, "layers of the CLIP tower", "layers")
    heads: int = option(4, "attention heads of the CLIP tower", "heads")
    patch: int = option(8, "side of a patch", "pixels")
    image_size: int = option(64, "side of the square image the tower sees", "pixels")
    feature_layer: int = option(-2, "hidden state that the projector reads (GeoChat: -2; with conv_widths: -1)")
    conv_widths: list[int] = field(
        default_factory=list,
        metadata={"help": "EarthGPT's tower: widths of a ConvNet's stages (strides 4, 8, ...); []: CLIP alone", "unit": ""},
    )
    conv_depths: list[int] = field(default_factory=list, metadata={"help": "blocks of each stage", "unit": ""})
    vit_layers: list[int] = field(
        default_factory=lambda: [-2, -4], metadata={"help": "hidden states of CLIP that are read, with conv_widths", "unit": ""}
    )


@dataclass
class ModelConfig:
    init: str = option(
        "", "folder of a saved model to start from, local or s3://; empty: random weights of the sizes below", "path"
    )
    tower: str = option("", "folder of a saved CLIP vision tower to start from (with an empty init)", "path")
    vision: VisionConfig = section(VisionConfig, "the CLIP tower, with empty init and tower")
    hidden: int = option(192, "width of the language model", "features")
    layers: int = option(4, "layers of the language model", "layers")
    heads: int = option(4, "attention heads of the language model", "heads")
    intermediate: int = option(512, "width of the language model's MLP", "features")
    freeze_tower: bool = option(True, "keep the vision tower's weights fixed")


@dataclass
class LoraConfig:
    rank: int = option(64, "rank r of the adapters")
    alpha: int = option(16, "their scale is alpha / rank")
    dropout: float = option(0.05, "dropout before an adapter, in updates only", "0-1")


@dataclass
class TrainConfig:
    method: str = option("sft", "sft: cross-entropy | kd: equations 1-3 | distill: the on-policy loop of Table 1")
    splits: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={"help": "shard splits whose images are drawn: train, unlabelled (distill only)", "unit": ""},
    )
    shards: str = option("", "prepared data of this stage, where it is not data.shards", "path")
    tuning: str = option("full", f"what is trained, beside the projector: {', '.join(TUNING)}")
    lora: LoraConfig = section(
        LoraConfig, "the adapters of tuning=lora, on every linear layer of the language model but its head"
    )
    steps: int = option(400, "updates of the weights", "steps")
    images_per_step: int = option(16, "global batch over all workers and accumulation steps", "images")
    images_per_micro_batch: int = option(16, "images in one forward and backward of one worker", "images")
    questions_per_row: int = option(8, "questions at most that share one image (n)", "questions")
    tokens_per_row: int = option(
        0, "tokens at most of an image row, answers included (an unknown one: max_response); 0: no limit", "tokens"
    )
    max_response: int = option(64, "longest response; a longer one in the data is set aside and counted", "tokens")
    learning_rate: float = option(2e-3, "peak learning rate of AdamW")
    final_learning_rate: float = option(0.1, "last learning rate as a share of the peak (cosine)", "0-1")
    warmup: float = option(0.03, "share of the steps with rising learning rate", "0-1")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradient norm to clip at; 0: no clipping")
    augment: bool = option(
        False, "turn and flip training images of which no text speaks of a place, and crop those whose class alone is asked"
    )
    blind: bool = option(False, "hide the image from the model (control: what language alone gives)")
    log_every: int = option(20, "steps between two lines of progress", "steps")
    keep: str = option("best", "which model is kept: best (lowest validation loss) | last (the on-policy loop: always the last)")
    validate_every: int = option(100, "steps between two passes over the validation split", "steps")
    checkpoint_every: int = option(100, "steps between two checkpoints", "steps")
    keep_checkpoints: int = option(2, "checkpoints kept: the last ones; beside them that of the lowest validation loss")


@dataclass
class LossConfig:
    preset: str = option(
        "paper",
        "paper | reference: the long-term return as MiniLLM's published code shapes it | seqkd, gkd: one term, weighed by single",
    )
    alpha: float = option(
        0.2,
        "teacher's share of the sampling mixture p~ = alpha p + (1 - alpha) q; preset gkd: share of the micro-batches it writes",
        "0-1",
    )
    temperature: float = option(1.0, "temperature T of both distributions")
    single: float = option(1.0, "weight of the single-step term")
    long: float = option(1.0, "weight of the long-term term")
    align: float = option(0.001, "weight of the feature alignment behind the projector (lambda_align); a squared distance")
    align_map: str = option("linear", "linear: learned map to the teacher's width | identity: widths must agree")
    pretrain: float = option(1.0, "weight of the language-modelling term on D_PT (lambda_pt)")
    decompose: bool = option(
        True, "single-step decomposition: the present token's KL exactly; false: its sampled reward joins the return instead"
    )
    single_step_weighting: str = option("none", "weight of each single-step KL: none | importance (w_t)")
    importance: str = option("token", "importance weight w: token (per token) | sequence (product over the response)")
    length_norm: bool = option(True, "divide the return R_{t+1} by the number of tokens left")
    updates_per_rollout: int = option(1, "updates made from one rollout; beyond the first with a clipped ratio", "updates")
    ratio_clip: float = option(0.2, "clip of the ratio rho_t when a rollout is used again")
    gkd_beta: float = option(0.5, "preset gkd: beta of the generalised JSD; 0: KL(p||q), 1: KL(q||p)", "0-1")
    kd_alpha: float = option(0.5, "method kd: weight of T^2 KL(p||q) against 1 - kd_alpha of cross-entropy (eq. 3)", "0-1")
    kd_temperature: float = option(1.0, "method kd: temperature T of equation 1")


@dataclass
class TowerConfig:
    images: int = option(20000, "generated scenes that the tower sees", "images")
    steps: int = option(2600, "updates", "steps")
    images_per_step: int = option(64, "batch", "images")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    seed: int = option(1000, "seed of the scenes, kept apart from every data set's")


@dataclass
class TeacherConfig:
    model: ModelConfig = section(ModelConfig, "the teacher's sizes or folder")
    first: TrainConfig = section(
        lambda: TrainConfig(steps=0), "a stage before train, such as alignment on general data; 0 steps: none"
    )
    train: TrainConfig = section(TrainConfig, "how finetune role=teacher trains it")


@dataclass
class StudentConfig:
    model: ModelConfig = section(ModelConfig, "the student's sizes or folder")
    train: TrainConfig = section(TrainConfig, "how finetune role=student trains the baseline")
    blind_steps: int = option(0, "updates of the control that sees no image (role=blind); 0: those of student.train", "steps")


@dataclass
class DistillConfig:
    teacher: str = option("${run}/teacher/model", "the frozen teacher's folder", "path")
    teacher_bits: int = option(0, "quantise the teacher's linear layers to 8 or 4 bits (needs bitsandbytes); 0: no", "bits")
    warm_start: TrainConfig = section(
        lambda: TrainConfig(method="kd"), "Table 1, first part: kd on labelled data; 0 steps: start from student.model"
    )
    train: TrainConfig = section(lambda: TrainConfig(method="distill"), "Table 1, the loop")
    pretrain_shards: str = option("", "prepared data of D_PT, the pre-training corpus, where it is not data.shards", "path")
    pretrain_splits: list[str] = field(default_factory=lambda: ["train"], metadata={"help": "shard splits of D_PT", "unit": ""})
    loss: LossConfig = section(LossConfig, "the terms of the objective")


@dataclass
class EvaluateConfig:
    models: dict[str, str] = field(
        default_factory=lambda: {
            "teacher": "${run}/teacher/model",
            "baseline": "${run}/baseline/model",
            "distilled": "${run}/distill/model",
        },
        metadata={"help": "name -> model folder, in the order of the report", "unit": ""},
    )
    blind: list[str] = field(
        default_factory=lambda: ["blind"], metadata={"help": "models of that list that answer without the image", "unit": ""}
    )
    split: str = option("test", "shard split to answer")
    images_per_batch: int = option(32, "images decoded together", "images")
    questions_per_row: int = option(8, "questions at most that share one image", "questions")
    max_response: int = option(64, "longest answer", "tokens")
    angle_counter_clockwise: bool = option(True, "sign of theta in the box text")
    samples: int = option(12, "images drawn in the report", "images")


@dataclass
class ClusterConfig:
    workers: int = option(1, "Ray Train workers", "processes")
    min_workers: int = option(0, "go on with so many workers at least where a node is lost; 0: wait for all", "processes")
    max_failures: int = option(3, "failures in a row, without a new checkpoint between them, after which a stage is given up")
    wait: float = option(600.0, "how long to wait for nodes that join a cluster: at the start, and after a failure", "s")
    cpus_per_worker: float = option(1.0, "logical CPUs that Ray reserves per worker", "CPUs")
    threads_per_worker: int = option(0, "torch threads per worker; 0: all cores / workers", "threads")
    use_gpu: bool = option(False, "one GPU per worker")
    precision: str = option("fp32", "fp32 | bf16 (float32 losses either way)")
    zero_stage: int = option(1, "DeepSpeed ZeRO stage of the student: 0, 1, 2, 3")
    shard_teacher: bool = option(False, "spread the teacher's weights over the workers, and gather them once per rollout")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, a third more work")
    attention: str = option(
        "auto", "how updates read the mask of image rows: sdpa | flex (GPUs) | auto: whichever measures faster"
    )
    loss_chunk: int = option(
        12 * 2**20, "logits (response tokens x vocabulary) that a loss has in hand; more come in turn", "logits"
    )
    data_tasks: int = option(1, "Ray Data tasks that decode at once for one worker", "tasks")
    window: int = option(32, "micro-batches decoded at a time; two windows are in memory at most", "micro-batches")


@dataclass
class SweepConfig:
    space: dict[str, str] = field(
        default_factory=lambda: {"distill.loss.alpha": "0 | 0.2 | 0.5", "distill.loss.temperature": "0.7 | 1 | 1.5"},
        metadata={"help": "key -> values, A | B | C, or a range, LOW .. HIGH or LOW .. HIGH log", "unit": ""},
    )
    search: str = option("grid", "grid: every combination of values | random | optuna")
    trials: int = option(12, "random, optuna: how many", "trials")
    scheduler: str = option("asha", "asha: stop the worse ones early | none")
    grace: int = option(100, "asha: updates of distill.train before a trial may be stopped; it is asked at validations", "steps")
    reduction: float = option(3.0, "asha: one of so many goes on at each rung")
    metric: str = option(
        "validation_loss", "what is compared: validation_loss, reverse_kl, agreement or another figure of metrics.jsonl"
    )
    mode: str = option("min", "min | max: is less or more of it better?")
    serve: bool = option(False, "serve the best student when the sweep has ended, beside the teacher, until it is stopped")
    port: int = option(8000, "port of this machine that sweep.serve listens at")
    at_once: int = option(0, "trials beside each other; 0: as many as the cluster holds", "trials")


@dataclass
class PredictConfig:
    scenes: str = option("", "a scene, or a folder of scenes (.tif .tiff .jp2 .png .jpg), local or s3://", "path")
    model: str = option("${run}/distill/model", "folder of the model that looks at them", "path")
    out: str = option("${run}/predict", "folder for the GeoJSON files", "path")
    questions: list[str] = field(
        default_factory=lambda: [f"{GROUNDING} describe the image in detail."],
        metadata={"help": "what is asked about every tile; boxes in the answers are what is found", "unit": ""},
    )
    tile: int = option(0, "side of a tile; 0: what the model sees", "pixels")
    overlap: int = option(-1, "of neighbouring tiles; -1: a quarter of a tile", "pixels")
    iou: float = option(0.3, "boxes of one label that overlap by so much are one object", "0-1")
    tiles_per_batch: int = option(16, "tiles that a worker reads together", "tiles")
    max_response: int = option(256, "longest answer", "tokens")


@dataclass
class ExportConfig:
    model: str = option("${run}/distill/model", "folder of the model, or of PEFT adapters, which are merged", "path")
    out: str = option("${run}/export", "folder for the exported models", "path")
    bits: list[int] = field(
        default_factory=lambda: [8],
        metadata={"help": "smaller variants of its linear layers: 8, 4 (needs bitsandbytes); none: [] [bits]", "unit": ""},
    )
    evaluate: bool = option(True, "measure each variant on evaluate.split of data.shards")
    license: str = option("other", "what the model card says: the licence of the weights it was made from")


@dataclass
class PlanConfig:
    gpu: str = option("A100-80", f"card to plan for: {', '.join(GPUS)}")
    memory: float = option(0.0, "its memory, where it is another; 0: that of the card", "GiB")
    reserve: float = option(2.0, "memory that CUDA, communication and fragmentation take", "GiB")
    matmul_share: float = option(0.45, "share of the card's bf16 rate that prefill and updates reach", "0-1")
    bandwidth_share: float = option(0.7, "share of its memory bandwidth that decoding reaches", "0-1")
    network: float = option(0.0, "all-reduce bandwidth of a worker; 0: that of the card's usual link", "GB/s")
    questions_per_image: float = option(4.0, "questions of an image, up to questions_per_row in a row", "questions")
    prompt_tokens: int = option(60, "tokens of a question with its prompt", "tokens")
    response_tokens: int = option(16, "tokens of a response", "tokens")
    workers_per_node: int = option(8, "scaling: workers, and cards, of a node", "processes")
    node_network: float = option(25.0, "scaling: network of a node, one direction, by the data sheet; 25: 200 Gbit/s", "GB/s")
    node_cores: int = option(
        96, "scaling: CPU cores of a node; those of its workers (cluster.cpus_per_worker) decode nothing", "cores"
    )
    node_store: float = option(1.0, "scaling: what a node's object store takes and gives of decoded pixels", "GB/s")
    storage: float = option(10.0, "scaling: what the storage of the shards gives to all nodes together", "GB/s")
    image_kilobytes: float = option(100.0, "scaling: size of an encoded image, where there are no shards yet", "kB")
    decode_ms: float = option(7.0, "scaling: time of a core to decode, resize and tokenise an image with its questions", "ms")


SEQKD = ["distill.loss.preset=seqkd", "distill.loss.alpha=1", "distill.loss.align=0"]
GKD = ["distill.loss.preset=gkd", "distill.loss.alpha=0.5", "distill.loss.align=0"]


@dataclass
class Config:
    run: str = option("runs/default", "folder of this run, local or s3://: data, models, metrics, report", "path")
    seed: int = option(0, "seed of initial weights, order of data and sampling")
    role: str = option("student", "finetune: teacher | student (the baseline) | blind (the baseline without images)")
    predictions: str = option("", "evaluate: score this file of JSON lines, and run no model", "path")
    output: str = option("", "evaluate: where the figures of `predictions` are written (JSON)", "path")
    ablation: dict[str, list[str]] = field(
        default_factory=lambda: {
            "full": [],
            "- alignment": ["distill.loss.align=0"],
            "- teacher mix": ["distill.loss.alpha=0"],
            "- single step": ["distill.loss.decompose=false"],
            "- long term": ["distill.loss.long=0"],
            "- length norm": ["distill.loss.length_norm=false"],
            "- PT": ["distill.loss.pretrain=0"],
            "sft": ["distill.train.method=sft", "distill.train.splits=[train]"],
            "kd": ["distill.train.method=kd", "distill.train.splits=[train]"],
            "seqkd": [*SEQKD, "distill.loss.pretrain=0"],
            "gkd": [*GKD, "distill.loss.pretrain=0"],
            "seqkd + PT": SEQKD,
            "gkd + PT": GKD,
        },
        metadata={
            "help": "jobs/ablation.py: name of a variant -> its overrides; the first is what the others are compared with",
            "unit": "",
        },
    )
    system: str = option(SYSTEM, "system text at the head of every prompt")
    image_size: int = option(
        0, "side of the square that images are brought to; 0: what the tower sees (Qwen2.5-VL sees any, and needs it)", "pixels"
    )
    features: str = option(
        "", "stored features of a frozen tower, which stages read in place of images (jobs/features.py); empty: none", "path"
    )
    checkpoints: str = option(
        "", "folder, local or s3://, for checkpoints (below it one for each stage); empty: in each stage's folder", "path"
    )
    mlflow: str = option("", "tracking URI of MLflow, such as sqlite:////tmp/mlflow.db, that stages log to as well; empty: none")
    data: DataConfig = section(DataConfig, "from raw data to shards")
    tower: TowerConfig = section(TowerConfig, "dense pre-training of the demo's vision tower (jobs/pretrain.py)")
    teacher: TeacherConfig = section(TeacherConfig, "the teacher")
    student: StudentConfig = section(StudentConfig, "the student")
    distill: DistillConfig = section(DistillConfig, "distillation")
    evaluate: EvaluateConfig = section(EvaluateConfig, "evaluation and report")
    cluster: ClusterConfig = section(ClusterConfig, "processes, precision, ZeRO")
    sweep: SweepConfig = section(SweepConfig, "what jobs/sweep.py tries")
    predict: PredictConfig = section(PredictConfig, "what jobs/predict.py looks for in whole scenes")
    export: ExportConfig = section(ExportConfig, "what jobs/export.py writes")
    resume: bool = option(False, "sweep: refuse to begin a new one: there has to be one that was interrupted")
    plan: PlanConfig = section(PlanConfig, "what jobs/plan.py reckons with")


@dataclass(frozen=True)
class Domain:
    """The values that a setting is tried with: a list of them, or a range."""

    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


def search_space(space: dict[str, str]) -> dict[str, Domain]:
    """sweep.space, read: "A | B | C", "LOW .. HIGH" or "LOW .. HIGH log". Raises ConfigError with the key and the remedy."""
    known = {name: kind for name, kind, *_ in keys()}
    found = {}
    for key, text in space.items():
        if key not in known or not key.startswith(("distill.", "student.", "seed")):
            near = difflib.get_close_matches(key, [name for name in known if name.startswith("distill.")], n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"sweep.space: {key!r} is no key of distill or student that could be swept{hint}")
        if ".." not in text or known[key] == "str":
            found[key] = Domain(tuple(_value(part) for part in text.split("|")))
            continue
        if known[key] != "float":
            raise ConfigError(f"sweep.space: {key}={text!r}: a range has fractions, and that key takes none; write A | B | C")
        ends, _, kind = text.strip().partition(" log")
        try:
            low, high = (float(part) for part in ends.split(".. ") if part)
        except ValueError:
            low = high = 0.0
        if kind.strip() or not low < high or (" log" in text and low <= 0):
            raise ConfigError(f"sweep.space: {key}={text!r} is no range; write LOW .. HIGH, or LOW .. HIGH log with LOW above 0")
        found[key] = Domain(low=low, high=high, log=" log" in text)
    return found


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.strip(), text.strip())


def keys(kind: type = Config, prefix: str = "") -> list[tuple[str, str, Any, str, str]]:
    """Every key as (name, type, default, unit, meaning), in the order of the file."""
    found = []
    for f in fields(kind):
        name = prefix + f.name
        if isinstance(f.type, type) and is_dataclass(f.type):
            found += keys(f.type, name + ".")
            continue
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        kind_name = getattr(f.type, "__name__", str(f.type)) if "[" not in str(f.type) else str(f.type)
        found.append((name, kind_name, default, f.metadata["unit"], f.metadata["help"]))
    return found


def load(file: str | None, overrides: list[str] | None = None) -> Config:
    """The resolved, validated settings of `file` (YAML) with `overrides` ("a.b=value") on top.

    Raises ConfigError, with the key and the remedy, for a missing file, an unknown key, a wrong type or a contradiction.
    """
    for item in overrides or []:
        if "=" not in item:
            raise ConfigError(f"override {item!r} is not of the form key=value")
    return _resolved(OmegaConf.structured(Config), _read(file) if file else [], overrides or [], file)


def _resolved(tree: Any, parts: list[DictConfig], overrides: list[str], file: str | None) -> Config:
    """The settings of `tree` with whole parts and then overrides on top, resolved and validated."""
    given = [f"{item}''" if item.endswith("=") else item for item in overrides]  # key= is an empty text, not null
    try:
        for part, texts in [*((part, None) for part in parts), (OmegaConf.from_dotlist(given), given)]:
            _need_groups(part)
            for name in ("evaluate.models", "ablation", "sweep.space"):
                # those of a file, or of NAME={...}, take the place of what was; NAME.KEY=... adds one
                whole = texts is None or any(text.startswith(f"{name}=") for text in texts)
                if whole and OmegaConf.select(part, name) is not None:
                    OmegaConf.update(tree, name, {}, merge=False)
            tree = OmegaConf.merge(tree, part)
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, file)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the overrides {' '.join(overrides)} cannot be read: {error}") from error
    except TypeError as error:
        raise ConfigError(f"the overrides {' '.join(overrides)} do not fit together: {error}") from error
    assert isinstance(config, Config)
    validate(config, search_space(config.sweep.space))
    return config


def changed(config: Config, overrides: list[str]) -> Config:
    """Resolved settings with further overrides ("a.b=value"). Raises ConfigError as `load` does."""
    return _resolved(OmegaConf.structured(config), [], overrides, None)


def _read(file: str, above: tuple[str, ...] = ()) -> list[DictConfig]:
    """What a file holds, behind what its base holds. above: files whose base this is."""
    if "://" not in file and not Path(file).is_file():
        raise ConfigError(f"config file {file} does not exist; the shipped ones are in configs/")
    try:
        found = OmegaConf.create(_text(file))
    except (yaml.YAMLError, OSError, ValueError, TypeError) as error:
        raise ConfigError(f"config file {file} is not YAML: {error}") from error
    if not isinstance(found, DictConfig):
        raise ConfigError(f"config file {file} must hold keys and values, not a list or a single value")
    base = found.pop("base", None)
    if base is None:
        return [found]
    if not isinstance(base, str) or file in above:
        raise ConfigError(f"config file {file}: base={base!r} must be another config file, which does not build on this one")
    return [*_read(base if "://" in base else os.path.join(os.path.dirname(file), base), (*above, file)), found]


def _text(file: str) -> str:
    if "://" not in file:
        return Path(file).read_text()
    from geodistill.data.files import beside, read_text  # pyarrow, for those alone who need it

    return read_text(*beside(file))


def _need_groups(part: DictConfig) -> None:
    """Raise ConfigError where a value stands for a whole group of settings, such as distill.loss=3."""
    for name in {name.rpartition(".")[0] for name, *_ in keys()} - {""}:
        for depth in range(name.count(".") + 1):
            group = ".".join(name.split(".")[: depth + 1])
            value = OmegaConf.select(part, group)
            if value is not None and not isinstance(value, DictConfig):
                raise ConfigError(f"{group} is a group of settings, not one value; set a key in it, such as {name}.KEY=...")


def absolute(config: Config) -> Config:
    """The same settings with every local path made absolute: workers of a cluster start in other folders."""

    def of(path: str) -> str:
        return str(Path(path).absolute()) if path and "://" not in path else path

    tree = OmegaConf.structured(config)
    paths = [name for name, _, _, unit, _ in keys() if unit == "path"]
    for name in paths:
        OmegaConf.update(tree, name, of(OmegaConf.select(tree, name)))
    for name, text in config.sweep.space.items():
        if name in paths:
            tree.sweep.space[name] = " | ".join(of(part.strip()) for part in text.split("|"))
    for name, path in config.evaluate.models.items():
        tree.evaluate.models[name] = of(path)
    if config.data.annotations:  # relative to data.root, or absolute
        tree.data.annotations = config.data.annotations
    found = OmegaConf.to_object(tree)
    assert isinstance(found, Config)
    return found


def _explain(error: OmegaConfBaseException, file: str | None) -> str:
    key = error.full_key or str(error.key)
    known = [name for name, *_ in keys()]
    where = f" (config {file})" if file else ""
    if "not in" in str(error) or type(error).__name__ == "ConfigKeyError":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
        hint = f"; did you mean {near[0]!r}?" if near else "; `--help` lists every key"
        return f"unknown key {key!r}{where}{hint}"
    for name, kind, default, _, _ in keys():
        if name == key:
            return f"key {key!r}{where}: {str(error).splitlines()[0]}; it takes {kind}, such as {default!r}"
    return f"key {key!r}{where}: {str(error).splitlines()[0]}"


def as_yaml(config: Config) -> str:
    """The resolved settings, as `load` reads them."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
