"""Make a published checkpoint (LLaVA-1.5, GeoChat, a LoRA adapter of one) a folder that plain transformers and every job load."""

import difflib
import sys
import tempfile
from pathlib import Path

USAGE = """usage: python jobs/convert.py source=FOLDER output=FOLDER [key=value ...]

source      folder of the checkpoint: original LLaVA-1.5 or GeoChat, LoRA adapter, or transformers LLaVA; told by its contents
output      folder to write; must not be there
base        folder of the model under an adapter [default: what adapter_config.json names, as a path or beside source]
tower       folder of the CLIP tower, where source does not hold it [default: what config.json names, as a path or beside source]
image_size  side of an image in pixels, such as 504 [default: the checkpoint's; 504 for a GeoChat]
dtype       bf16, fp16 or fp32 [default: the checkpoint's]
check       true: compare the logits of source and output, which takes the weights' size in memory; false: do not [default: true]
system      system text of the prompt [default: GeoChat's]"""
KEYS = [line.split(" ", 1)[0] for line in USAGE.splitlines()[2:]]


def settings(arguments: list[str]) -> dict:
    """`key=value ...` -> the arguments of `convert`. Raises ValueError with the remedy."""
    found: dict = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
            raise ValueError(f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else "--help lists every key"))
        found[key] = value
    if missing := [key for key in ("source", "output") if not found.get(key)]:
        raise ValueError(f"{' and '.join(missing)} missing; give {missing[0]}=FOLDER")
    if found.get("dtype", "bf16") not in ("bf16", "fp16", "fp32"):
        raise ValueError(f"dtype={found['dtype']}: give bf16, fp16 or fp32")
    if found.get("check", "true") not in ("true", "false"):
        raise ValueError(f"check={found['check']}: give true or false")
    if "image_size" in found:
        if not found["image_size"].isdecimal() or not int(found["image_size"]):
            raise ValueError(f"image_size={found['image_size']}: give pixels, such as 504")
        found["image_size"] = int(found["image_size"])
    return {**found, "check": found.get("check", "true") == "true"}


def convert_job(chosen: dict) -> None:
    """`convert`, from and to folders that may be s3://. Raises ValueError, OSError."""
    from geodistill.data.files import exists, local, open_folder, upload
    from geodistill.models.convert import convert

    output = chosen["output"]
    chosen = chosen | {key: local(chosen[key]) for key in ("source", "base", "tower") if chosen.get(key)}
    if "://" not in output:
        convert(**chosen)
        return
    if exists(open_folder(output), "config.json"):
        raise ValueError(f"output={output} is there already; give another folder, or remove it")
    with tempfile.TemporaryDirectory() as here:
        convert(**chosen | {"output": f"{here}/model"})
        upload(Path(here) / "model", output)


def main(arguments: list[str]) -> int:
    """Exit codes: 0 done; 1 the checkpoint cannot be converted, with the reason on stderr; 2 wrong settings."""
    if not {"--help", "-h"}.isdisjoint(arguments):
        print(USAGE)
        return 0
    try:
        chosen = settings(arguments)
    except ValueError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    try:
        convert_job(chosen)
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 1
    print(f"model: {chosen['output']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
