"""Can a teacher and a student write one response together? Answered from their JSON files, before torch is loaded."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from geodistill.config import Config
from geodistill.data.files import local
from geodistill.train.stage import Stage


def check_stage_pair(config: Config, stage: Stage) -> None:
    """Raise ValueError if the teacher of a stage (where it has one) and its student cannot be compared token by token."""
    if not stage.teacher:
        return
    model = getattr(config, stage.role).model
    start = stage.weights or model.init
    sizes = {"model_type": "llava", "image_size": model.vision.image_size, "patch_size": model.vision.patch}
    image = image_reading(start or model.tower) if start or model.tower else sizes
    check_pair(stage.teacher, vocabulary_of(start or stage.teacher), image)


def image_reading(folder: str | Path) -> dict[str, Any]:
    """What decides the image tokens of a saved model or tower, from its JSON files alone. Raises ValueError.

    Of a LLaVA: image_size and patch_size in pixels; of another family, how its image processor cuts an image as well.
    """
    here = local(folder, weights=False)
    file = here / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no model (config.json is missing); run the job that writes it, or correct the path")
    config = json.loads(file.read_text())
    vision = config.get("vision_config", config)
    if "vision_config" not in config and "image_size" not in vision:
        kind = config.get("model_type")
        raise ValueError(f"{folder} ({kind}) is no image-text-to-text model of transformers: convert it with jobs/convert.py")
    if "vision_config" not in config or config["model_type"] in ("llava", "clip"):
        return {"model_type": "llava", "image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    found = {"model_type": config["model_type"]}
    found |= {k: vision[k] for k in ("image_size", "patch_size", "spatial_merge_size") if k in vision}
    found |= {k: config[k] for k in ("downsample_ratio", "scale_factor", "image_grid_pinpoints", "image_token_id") if k in config}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (here / name).is_file():
            settings = json.loads((here / name).read_text())
            settings = settings.get("image_processor", settings)
            pixels = {"shortest_edge": settings.get("min_pixels"), "longest_edge": settings.get("max_pixels")}
            if any(pixels.values()):  # published Qwen2.5-VL; saved again, they are the edges of its size
                settings["size"] = (settings.get("size") or {}) | {k: v for k, v in pixels.items() if v}
            names = ("size", "image_mean", "image_std", "max_image_size", "crop_size")
            found |= {k: settings[k] for k in names if k in settings}
    return found


def vocabulary_of(folder: str | Path) -> dict[str, int]:
    """Token -> id of a saved model, from its tokenizer.json alone. Raises ValueError where there is none."""
    file = local(folder, weights=False) / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no tokenizer.json; run the job that writes it, or correct the path")
    return Tokenizer.from_file(str(file)).get_vocab()


def check_pair(teacher: str | Path, student_vocabulary: dict[str, int], student_image: dict[str, Any]) -> None:
    """Raise ValueError before any weight is loaded if teacher and student cannot write one response together.

    student_image: its `image_reading`.
    """
    image = image_reading(teacher)
    if image != student_image:
        odd = [k for k in sorted(image.keys() | student_image.keys()) if image.get(k) != student_image.get(k)]
        odd = ["model_type"] if "model_type" in odd else odd
        counts = []
        for one in (image, student_image):
            tokens = f"{(one['image_size'] // one['patch_size']) ** 2} image tokens, " if one["model_type"] == "llava" else ""
            counts.append(tokens + ", ".join(f"{k} {one.get(k)}" for k in odd))
        raise ValueError(
            f"the teacher {teacher} and the student see an image in different tokens (teacher: {counts[0]}; student: {counts[1]})"
            "; choose a student of the same family that sees as much, or give student.model.vision the teacher's image_size and "
            "patch"
        )
    vocabulary = vocabulary_of(teacher)
    if vocabulary != student_vocabulary:
        different = sorted(set(vocabulary.items()) ^ set(student_vocabulary.items()))[:3]
        raise ValueError(
            f"teacher {teacher} ({len(vocabulary)} tokens) and student ({len(student_vocabulary)} tokens) have different "
            f"vocabularies, for example {different}: token distributions can only be compared over one vocabulary"
        )
