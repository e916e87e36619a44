"""What settings must fulfil, each for itself and together."""

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geodistill.config import Config, Domain

SOURCE_NAMES = (
    "synthetic", "class_folders", "llava", "geochat_bench", "rsvqa", "floodnet", "captions", "dota", "dior", "fair1m", "samrs",
    "yolo", "coco",
)  # fmt: skip
SENSORS = ("optical", "sar", "infrared")
TUNING = ("full", "lora", "bias", "attention_and_norm", "projector")
GPUS = ("A100-40", "A100-80", "H100-80", "H200-141", "L40S-48", "RTX4090-24")  # what they can do: train/plan.py


class ConfigError(ValueError):
    """A setting that cannot be used: the message names the key and the remedy."""


def validate(config: "Config", space: "dict[str, Domain]") -> None:
    """Raise ConfigError for the first contradiction, naming the keys and the remedy. space: sweep.space, read."""

    def need(good: bool, message: str) -> None:
        if not good:
            raise ConfigError(message)

    def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
        need(value in allowed, f"{key}={value!r} is none of {', '.join(allowed)}")

    for key, text in _texts(asdict(config)):
        need(
            not re.search(r"s3://\S*[?]|s3://[^/\s]*:|://[^/\s]*@", text),
            f"{key} holds credentials or options of a store, which would be written to files and logs: put them into the "
            "environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION; "
            "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD), or use the machine's role",
        )
    need(
        bool(config.predictions) == bool(config.output),
        f"predictions={config.predictions} and output={config.output} go together: FILE.jsonl to score, FILE.json to write",
    )
    one_of("role", config.role, ("teacher", "student", "blind"))
    one_of("data.source", config.data.source, SOURCE_NAMES)
    need(
        bool(config.predictions) or config.data.angle_counter_clockwise == config.evaluate.angle_counter_clockwise,
        "data.angle_counter_clockwise and evaluate.angle_counter_clockwise differ: boxes would be written with one sign of theta "
        "and read with the other; set both alike",
    )
    one_of("data.duplicates", config.data.duplicates, ("report", "remove"))
    need(-1 <= config.data.duplicate_bits <= 16, f"data.duplicate_bits={config.data.duplicate_bits} must lie between -1 and 16")
    one_of("data.sensor", config.data.sensor, SENSORS)
    one_of("cluster.precision", config.cluster.precision, ("fp32", "bf16"))
    one_of("cluster.attention", config.cluster.attention, ("auto", "sdpa", "flex"))
    need(
        config.cluster.attention != "flex" or config.cluster.use_gpu,
        "cluster.attention=flex needs GPUs (cluster.use_gpu=true): torch has no backward pass of FlexAttention on CPUs; use auto",
    )
    cluster = config.cluster
    need(
        0 <= cluster.min_workers <= cluster.workers,
        f"cluster.min_workers={cluster.min_workers} must lie between 0 and cluster.workers={cluster.workers}",
    )
    need(cluster.max_failures >= 0, f"cluster.max_failures={cluster.max_failures} must not be below 0")
    need(config.cluster.zero_stage in (0, 1, 2, 3), f"cluster.zero_stage={config.cluster.zero_stage}: use 0, 1, 2 or 3")
    need(config.distill.teacher_bits in (0, 4, 8), f"distill.teacher_bits={config.distill.teacher_bits}: use 0, 8 or 4")
    need(
        not (config.distill.teacher_bits and config.cluster.shard_teacher),
        f"distill.teacher_bits={config.distill.teacher_bits} and cluster.shard_teacher=true exclude each other: quantised "
        "weights cannot be gathered; set one of them",
    )
    sweep = config.sweep
    one_of("sweep.search", sweep.search, ("grid", "random", "optuna"))
    one_of("sweep.scheduler", sweep.scheduler, ("asha", "none"))
    one_of("sweep.mode", sweep.mode, ("min", "max"))
    need(bool(space), "sweep.space is empty; name one setting at least, such as sweep.space={distill.loss.alpha: 0 | 0.2}")
    ranges = [key for key, domain in space.items() if not domain.values]
    need(
        sweep.search != "grid" or not ranges,
        f"sweep.search=grid needs values, but {', '.join(ranges)} in sweep.space is a range; write A | B | C, or set "
        "sweep.search=random",
    )
    need(sweep.trials >= 1 and sweep.grace >= 1, "sweep.trials and sweep.grace must be at least 1")
    need(sweep.reduction > 1, f"sweep.reduction={sweep.reduction} must be above 1")
    need(sweep.at_once >= 0, f"sweep.at_once={sweep.at_once} must not be below 0")
    need(set(config.export.bits) <= {4, 8}, f"export.bits={config.export.bits}: use 8, 4 or both")
    need(4 not in config.export.bits or cluster.use_gpu, "export.bits with 4 needs a GPU (cluster.use_gpu=true)")
    predict = config.predict
    need(bool(predict.questions), "predict.questions is empty; ask something about each tile")
    need(
        predict.tile == 0 or predict.overlap < predict.tile,
        f"predict.overlap={predict.overlap} must be smaller than predict.tile={predict.tile}",
    )
    need(predict.tile >= 0 and predict.overlap >= -1, "predict.tile and predict.overlap must not be below 0 (overlap: or -1)")
    need(0 < predict.iou <= 1, f"predict.iou={predict.iou} must lie above 0 and not above 1")
    need(predict.tiles_per_batch >= 1 and predict.max_response >= 1, "predict.tiles_per_batch, predict.max_response: at least 1")
    one_of("plan.gpu", config.plan.gpu, GPUS)
    for name in ("matmul_share", "bandwidth_share"):
        need(0 < getattr(config.plan, name) <= 1, f"plan.{name}={getattr(config.plan, name)} must lie above 0 and not above 1")
    for name in ("questions_per_image", "prompt_tokens", "response_tokens"):
        need(getattr(config.plan, name) >= 1, f"plan.{name}={getattr(config.plan, name)} must be at least 1")
    for name in ("workers_per_node", "node_network", "node_cores", "node_store", "storage", "image_kilobytes", "decode_ms"):
        need(getattr(config.plan, name) > 0, f"plan.{name}={getattr(config.plan, name)} must be above 0")
    for key in ("workers", "data_tasks", "window", "loss_chunk"):
        need(getattr(config.cluster, key) >= 1, f"cluster.{key}={getattr(config.cluster, key)} must be at least 1")
    data = config.data
    for name in ("unlabelled_fraction", "val_fraction", "test_fraction", "max_rejected"):
        need(0 <= getattr(data, name) <= 1, f"data.{name}={getattr(data, name)} must lie between 0 and 1")
    need(
        data.val_fraction + data.test_fraction < 1,
        f"data.val_fraction={data.val_fraction} and data.test_fraction={data.test_fraction} leave no training images; "
        "their sum must stay below 1",
    )
    need(data.images_per_group >= 1, "data.images_per_group must be at least 1")
    need(data.images_per_shard >= 1, "data.images_per_shard must be at least 1")
    need(all(band >= 1 for band in data.bands), f"data.bands={data.bands}: bands count from 1")
    need(0 < data.min_visible <= 1, f"data.min_visible={data.min_visible} must lie above 0 and not above 1")
    need(
        not data.tile or 0 <= data.tile_overlap < data.tile,
        f"data.tile_overlap={data.tile_overlap} must be less than data.tile={data.tile}",
    )
    need(
        data.images_per_shard % data.images_per_group == 0,
        f"data.images_per_shard={data.images_per_shard} must be a multiple of data.images_per_group={data.images_per_group}",
    )
    for role in ("teacher", "student"):
        model = getattr(config, role).model
        need(
            model.hidden % model.heads == 0 and (model.hidden // model.heads) % 2 == 0,
            f"{role}.model.hidden={model.hidden} must be {role}.model.heads={model.heads} times an even number",
        )
        vision = model.vision
        need(
            vision.image_size % vision.patch == 0,
            f"{role}.model.vision.image_size={vision.image_size} must be a multiple of {role}.model.vision.patch={vision.patch}",
        )
        need(
            len(vision.conv_widths) == len(vision.conv_depths),
            f"{role}.model.vision.conv_widths={vision.conv_widths} and conv_depths={vision.conv_depths} must name as many stages",
        )
        if vision.conv_widths:
            stride = 4 * 2 ** (len(vision.conv_widths) - 1)
            need(
                min(vision.conv_widths + vision.conv_depths) >= 1 and stride <= vision.image_size,
                f"{role}.model.vision.conv_widths={vision.conv_widths} and conv_depths={vision.conv_depths} must be positive, "
                f"and the last stage's stride of {stride} pixels not above {role}.model.vision.image_size={vision.image_size}",
            )
            need(
                vision.feature_layer == -1,
                f"{role}.model.vision.feature_layer={vision.feature_layer}: a tower with conv_widths joins its layers into one; "
                f"set {role}.model.vision.feature_layer=-1, and choose layers with {role}.model.vision.vit_layers",
            )
            need(
                bool(vision.vit_layers) and all(-vision.layers - 1 <= i <= vision.layers for i in vision.vit_layers),
                f"{role}.model.vision.vit_layers={vision.vit_layers} must name hidden states from {-vision.layers - 1} to "
                f"{vision.layers}",
            )
    need(bool(config.evaluate.models), "evaluate.models is empty; name one model at least: evaluate.models={mine: FOLDER}")
    need(config.evaluate.images_per_batch >= 1, "evaluate.images_per_batch must be at least 1")
    need(config.evaluate.questions_per_row >= 1, "evaluate.questions_per_row must be at least 1")
    need(bool(config.ablation), "ablation is empty; name one variant at least, such as ablation={full: []}")
    loss = config.distill.loss
    one_of("distill.loss.preset", loss.preset, ("paper", "reference", "seqkd", "gkd"))
    one_of("distill.loss.align_map", loss.align_map, ("linear", "identity"))
    one_of("distill.loss.single_step_weighting", loss.single_step_weighting, ("none", "importance"))
    one_of("distill.loss.importance", loss.importance, ("token", "sequence"))
    for name in ("alpha", "kd_alpha", "gkd_beta"):
        need(0 <= getattr(loss, name) <= 1, f"distill.loss.{name}={getattr(loss, name)} must lie between 0 and 1")
    for name in ("temperature", "kd_temperature"):
        need(getattr(loss, name) > 0, f"distill.loss.{name}={getattr(loss, name)} must be above 0")
    need(
        loss.preset != "seqkd" or loss.alpha == 1,
        f"distill.loss.preset=seqkd learns what the teacher writes alone, and distill.loss.alpha={loss.alpha}: set "
        "distill.loss.alpha=1",
    )
    need(loss.updates_per_rollout >= 1, "distill.loss.updates_per_rollout must be at least 1")
    need(
        loss.preset != "reference" or loss.decompose,
        "distill.loss.decompose=false leaves out what preset=reference weighs; set distill.loss.preset=paper",
    )
    need(
        loss.preset != "reference" or loss.importance == "token",
        "distill.loss.preset=reference uses per-token weights; set distill.loss.importance=token",
    )
    need(
        loss.updates_per_rollout == 1 or loss.importance == "token",
        f"distill.loss.updates_per_rollout={loss.updates_per_rollout} clips a ratio per token; "
        "set distill.loss.importance=token or distill.loss.updates_per_rollout=1",
    )
    need(
        not config.features or config.student.model.init != "" or config.student.model.tower != "",
        f"features={config.features} come from a saved tower, but the student's is random: set student.model.init or "
        "student.model.tower, or features= (images)",
    )
    need(
        not config.features or not config.distill.pretrain_shards,
        f"features={config.features} are those of data.shards, not of distill.pretrain_shards={config.distill.pretrain_shards}: "
        "set features= (images) or distill.pretrain_shards= (none of its own)",
    )
    trains = {
        "teacher.first": config.teacher.first,
        "teacher.train": config.teacher.train,
        "student.train": config.student.train,
        "distill.warm_start": config.distill.warm_start,
        "distill.train": config.distill.train,
    }
    for name, train in trains.items():
        one_of(f"{name}.method", train.method, ("sft", "kd", "distill"))
        one_of(f"{name}.keep", train.keep, ("best", "last"))
        one_of(f"{name}.tuning", train.tuning, TUNING)
        need(train.lora.rank >= 1, f"{name}.lora.rank={train.lora.rank} must be at least 1")
        need(0 <= train.lora.dropout < 1, f"{name}.lora.dropout={train.lora.dropout} must lie in [0, 1)")
        for split in train.splits:
            one_of(f"{name}.splits", split, ("train", "unlabelled"))
        need(bool(train.splits), f"{name}.splits is empty; set it to [train]")
        need(
            "unlabelled" not in train.splits or train.method == "distill",
            f"{name}.splits holds 'unlabelled', whose images have no answers, but {name}.method={train.method} "
            f"learns from answers; set {name}.method=distill or {name}.splits=[train]",
        )
        least = 0 if name in ("distill.warm_start", "teacher.first") else 1
        need(train.steps >= least, f"{name}.steps={train.steps} must be at least {least}")
        if train.steps == 0:
            continue
        for key in (
            "images_per_step", "images_per_micro_batch", "questions_per_row", "max_response",
            "log_every", "validate_every", "checkpoint_every", "keep_checkpoints",
        ):  # fmt: skip
            need(getattr(train, key) >= 1, f"{name}.{key}={getattr(train, key)} must be at least 1")
        need(
            train.tokens_per_row == 0 or train.tokens_per_row > train.max_response,
            f"{name}.tokens_per_row={train.tokens_per_row} does not hold an answer of {name}.max_response={train.max_response}; "
            f"raise it to the length of the image and some questions with their answers, or set {name}.tokens_per_row=0",
        )
        share = train.images_per_micro_batch * config.cluster.workers
        need(
            train.images_per_step % share == 0,
            f"{name}.images_per_step={train.images_per_step} must be a multiple of {name}.images_per_micro_batch="
            f"{train.images_per_micro_batch} times cluster.workers={config.cluster.workers} ({share})",
        )
        need(
            train.images_per_micro_batch % data.images_per_group == 0,
            f"{name}.images_per_micro_batch={train.images_per_micro_batch} must be a multiple of "
            f"data.images_per_group={data.images_per_group}, the unit of reading",
        )
        need(0 <= train.warmup < 1, f"{name}.warmup={train.warmup} must lie in [0, 1)")
        model = config.teacher.model if name.startswith("teacher") else config.student.model
        need(
            not config.features or model.freeze_tower or train.tuning != "full",
            f"features={config.features} are a frozen tower's, but {name} trains it: set freeze_tower=true for that model, or "
            "features= (images)",
        )
        need(
            not (config.features and train.augment),
            f"features={config.features} are those of images as they are, but {name}.augment=true changes them: set "
            f"{name}.augment=false or features= (images)",
        )
    need(
        config.distill.pretrain_splits == ["train"],
        f"distill.pretrain_splits={config.distill.pretrain_splits}: the language-modelling term needs answers; set it to [train]",
    )
    for name in ("first", "train"):
        need(getattr(config.teacher, name).method == "sft", f"teacher.{name}.method must be sft: the teacher has no teacher")
    need(config.student.train.method == "sft", "student.train.method must be sft; for kd use jobs/distill.py")
    need(
        config.distill.warm_start.method in ("sft", "kd"),
        "distill.warm_start.method must be kd or sft; the on-policy loop is distill.train",
    )


def need_source(config: "Config") -> None:
    """Raise ConfigError where the settings do not say what `prepare` reads; other jobs read shards."""
    data = config.data
    if data.source != "synthetic" and not data.root:
        raise ConfigError(f"data.source={data.source} needs data.root=FOLDER, the folder of the raw data set")
    if data.source == "llava" and not data.annotations:
        raise ConfigError(f"data.source={data.source} needs data.annotations=FILE.json")


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of every text in a tree of settings."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, (dict, list)):
        for name, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _texts(part, f"{key}.{name}" if key else str(name))
