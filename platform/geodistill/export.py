"""A student as others take it: merged weights, processor and model card, and smaller variants with what they lose.

Every folder is what plain transformers loads; whether vLLM's classes read it is checked without vLLM.
"""

import gc
import json
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForImageTextToText

from geodistill.config import Config
from geodistill.data.files import beside, exists, local, open_folder, read_text, write_json, write_text
from geodistill.data.shards import load_manifest
from geodistill.evaluate.benchmarks import answer
from geodistill.evaluate.metrics import score
from geodistill.models import assemble

# classes of transformers that vLLM serves under the same name, and the towers that its LLaVA reads
VLLM = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration", "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration", "InternVLForConditionalGeneration", "SmolVLMForConditionalGeneration",
        "Idefics3ForConditionalGeneration")  # fmt: skip
VLLM_TOWERS = ("clip_vision_model", "siglip_vision_model", "pixtral")
FIGURES = ("scene_classification", "vqa", "grounding", "captioning", "mean")


def merged(folder: str):
    """(model, processor) of a folder, in the precision in which it was saved; PEFT adapters are merged, in float32, into the
    model that they were trained for. Raises ValueError."""
    here = local(folder)
    settings = here / "adapter_config.json"
    if not settings.is_file():
        return assemble.load(folder, _dtype(folder))
    from peft import PeftModel

    base = json.loads(settings.read_text())["base_model_name_or_path"]
    model, processor = assemble.load(base)
    return PeftModel.from_pretrained(model, here).merge_and_unload().to(_dtype(base)), processor


def _dtype(folder: str) -> torch.dtype:
    return assemble.config_of(folder).dtype or torch.float32


def _free() -> None:
    """Give the GPU back to the actor that evaluates."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def size_of(folder: Path) -> float:
    """The weights of a folder in MB."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def vllm_reads(folder: Path) -> str:
    """ "" where vLLM's own classes read an exported folder, else the reason why not."""
    settings = json.loads((folder / "config.json").read_text())
    (name,) = settings["architectures"]
    if name not in VLLM:
        return f"{name} is none of its models"
    tower = settings.get("vision_config", {}).get("model_type")
    if name == "LlavaForConditionalGeneration" and tower not in VLLM_TOWERS:
        return f"its LLaVA reads no tower of type {tower}"
    needed = {"tokenizer.json": ("tokenizer.json",), "a chat template": ("chat_template.jinja", "chat_template.json"),
              "an image processor": ("processor_config.json", "preprocessor_config.json")}  # fmt: skip
    missing = [what for what, files in needed.items() if not any((folder / file).is_file() for file in files)]
    return f"{', '.join(missing)} is missing" if missing else ""


def export(config: Config) -> dict:
    """Write out/student and a variant for each of export.bits, measured; returns {"variants": {name: figures}}.

    Raises ValueError for a folder that holds no model, or where bitsandbytes is missing.
    """
    options, out = config.export, config.export.out
    model, processor = merged(options.model)
    folders = {"student": f"{out}/student"}
    assemble.save(model, processor, folders["student"])
    del model
    for bits in options.bits:
        name = f"student-int{bits}" if bits == 8 else "student-nf4"
        folders[name] = f"{out}/{name}"
        small, _ = assemble.load(folders["student"], torch.bfloat16 if config.cluster.use_gpu else torch.float32, bits)
        assemble.save(small, processor, folders[name])
        del small
        _free()
    variants: dict[str, dict] = {}
    for name, folder in folders.items():
        here = local(folder)
        variants[name] = {"MB": size_of(here), "vllm": vllm_reads(here)}
        loaded, info = AutoModelForImageTextToText.from_pretrained(here, output_loading_info=True)
        del loaded
        _free()
        wrong = {k: sorted(v) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if (v := info.get(k))}
        if wrong:
            raise ValueError(f"{folder} does not load as it was written: {wrong}")
        if options.evaluate:
            asked = replace(config, evaluate=replace(config.evaluate, models={name: folder}, blind=[]))
            summary = score(answer(asked, name, folder), config.evaluate.angle_counter_clockwise)["summary"]
            variants[name] |= {figure: summary[figure] for figure in FIGURES if figure in summary}
    stage, _ = beside(options.model.rstrip("/"))
    for name, folder in folders.items():
        files = open_folder(folder)
        write_text(files, "README.md", model_card(config, name, variants))
        if exists(stage, "config.yaml"):
            write_text(files, "training.yaml", read_text(stage, "config.yaml"))
    write_json(open_folder(out), "export.json", {"variants": variants})
    return {"variants": variants}


def export_table(found: dict) -> str:
    """The variants: size and figures."""
    figures = [name for name in FIGURES if any(name in row for row in found["variants"].values())]
    lines = [f"{'':14} {'MB':>9} " + " ".join(f"{name.replace('_', ' '):>20}" for name in figures) + "  vLLM"]
    for name, row in found["variants"].items():
        cells = " ".join(f"{row[figure]:20.1f}" if figure in row else f"{'-':>20}" for figure in figures)
        lines.append(f"{name:14} {row['MB']:9.1f} {cells}  {row['vllm'] or 'reads it'}")
    return "\n".join(lines)


def model_card(config: Config, name: str, variants: dict[str, dict]) -> str:
    """The README.md of an exported folder."""
    head = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": config.export.license,
        "tags": ["remote-sensing", "knowledge-distillation", "geodistill"],
    }
    loss, loop = config.distill.loss, config.distill.train
    try:
        manifest = load_manifest(config.data.shards)
        splits = {split: (part["images"], part["conversations"]) for split, part in manifest["splits"].items()}
        source = manifest["settings"]["source"]
        data = "\n".join(f"| {split} | {images} | {asked} |" for split, (images, asked) in splits.items())
        data = f"Source: `{source}`.\n\n| split | images | conversations |\n|---|---|---|\n{data}"
    except ValueError:
        data = "Not recorded."
    figures = [figure for figure in FIGURES if any(figure in row for row in variants.values())]
    rows = "\n".join(
        f"| {'**' + variant + '**' if variant == name else variant} | {row['MB']:.1f} | "
        + " | ".join(f"{row[figure]:.1f}" if figure in row else "-" for figure in figures)
        + " |"
        for variant, row in variants.items()
    )
    results = (
        f"| variant | MB | {' | '.join(figure.replace('_', ' ') for figure in figures)} |\n|{'---|' * (len(figures) + 2)}\n{rows}"
    )
    reads = variants[name]["vllm"]
    return f"""---
{yaml.safe_dump(head, sort_keys=False).strip()}
---
# {name}

A vision-language model for remote-sensing images, distilled from a larger teacher with GeoDistill.

## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
```

One image, in the first message of the user. Boxes are asked for with `[grounding]`, `[refer] where is <p>...</p>?` and
`[identify] what is at {{<x1><y1><x2><y2>|<angle>}}?`, and written in percent of the image's sides, the angle in degrees
{"counter-clockwise" if config.evaluate.angle_counter_clockwise else "clockwise"}. Images are padded to a square.
With vLLM: {"its classes read this folder" if not reads else f"not, {reads}"}.

## Training

Warm start: {config.distill.warm_start.steps} steps of {config.distill.warm_start.method}; then {loop.steps} steps of on-policy
distillation, {loop.images_per_step} images a step, learning rate {loop.learning_rate:g}, tuning `{loop.tuning}`. Teacher's share
in sampling {loss.alpha:g}, temperature {loss.temperature:g}; weights of the long term {loss.long:g}, of alignment
{loss.align:g}, of language modelling {loss.pretrain:g}. Every setting: `training.yaml`.

## Data

{data}

## Results

Split `{config.evaluate.split}`, %: accuracy, accuracy, boxes matched at IoU 0.25, ROUGE-L, and their mean.

{results}

## Limits

It answers in the words and formats of its training data, counts and places small objects badly, and says something about every
image, also one that shows nothing of what is asked. Other sensors, resolutions or regions than those of its data have not been
measured.
"""
