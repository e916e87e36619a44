"""Let models answer a split of the shards: Ray Data actors, greedy decoding over image rows, one prediction a question."""

import json
import os
import time
from collections import Counter

import ray.data
import torch

from geodistill.cluster import need_one, quiet_data
from geodistill.config import Config, as_yaml
from geodistill.data.files import exists, local, open_folder, read_json, read_lines, write_json, write_text
from geodistill.data.shards import Group, groups, load_manifest, read_group
from geodistill.data.stream import MicroBatch, to_micro_batch
from geodistill.distill.decode import decode
from geodistill.evaluate import metrics
from geodistill.models import assemble
from geodistill.models.reader import Reader

SIZE_GROUPS = ("small", "medium", "large")  # of an object that is asked for: GeoChat-Bench's
MANY = ("geochat_bench", "rsvqa")  # sources of several benchmarks


class Answerer:
    """One model, loaded once in its actor. blind: answer without the image."""

    def __init__(self, config: Config, folder: str, blind: bool):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.cluster.workers))
        self.config, self.blind = config, blind
        self.made_with = load_manifest(config.data.shards)["settings"]
        device, dtype = (
            "cuda" if config.cluster.use_gpu else "cpu",
            torch.bfloat16 if config.cluster.precision == "bf16" else torch.float32,
        )
        options = config.evaluate
        self.reader = Reader(folder, device, dtype, options.questions_per_row, image_size=config.image_size)

    def __call__(self, row: dict) -> dict:
        """{"groups": JSON of row groups} -> {"predictions": JSON list of dicts, "set_aside": JSON list of reasons}."""
        found = [Group(**g) for g in json.loads(row["groups"])]
        records = [r for group in found for r in read_group(self.config.data.shards, group)]
        predictions, set_aside, size = [], [], self.config.evaluate.images_per_batch
        for at in range(0, len(records), size):
            batch = to_micro_batch(records[at : at + size], self.reader.packer, self.reader.size)
            set_aside += batch.rejected
            sides = {record.id: {"width": record.width, "height": record.height} for record in records[at : at + size]}
            predictions += [p | sides[p["id"]] for p in self.answer(batch)] if batch.ids else []
        return {"predictions": json.dumps(predictions), "set_aside": json.dumps(set_aside)}

    def answer(self, batch: MicroBatch) -> list[dict]:
        """A prediction for every question of a batch of images, greedily decoded."""
        reader, model = self.reader, self.reader.model
        rows = reader.packer.pack(batch.questions).to(reader.device)
        pixels = model.prepare(torch.from_numpy(batch.pixels).to(reader.device), self.blind)
        with torch.inference_mode():
            z = model.project(model.see(pixels))
        out = decode([model], [1.0], rows, [z], self.config.evaluate.max_response, reader.forbidden, reader.end, greedy=True)
        order = rows.question_Rn[rows.alive_Rn].argsort()
        answers = [*zip(out.tokens_RnT[rows.alive_Rn][order].tolist(), out.length_Rn[rows.alive_Rn][order].tolist(), strict=True)]
        asked = [(image, question) for image, found in zip(batch.ids, batch.questions, strict=True) for question in found]
        return [
            {
                "benchmark": benchmark_of(self.made_with, image, self.config.data.name),
                "id": image,
                "task": question.task,
                "category": question.category,
                "size_group": question.category if question.category in SIZE_GROUPS else "",
                "question": question.text,
                "prediction": reader.text(tokens[:length]),
                "references": question.references,
            }
            for (image, question), (tokens, length) in zip(asked, answers, strict=True)
        ]


def benchmark_of(settings: dict, image: str, name: str = "") -> str:
    """The name of the data set that an image belongs to: where a source holds several, the first part of the image's id.

    settings: those that the shards were made with; name: in place of theirs.
    """
    if settings["source"] in MANY:
        return image.partition("/")[0]
    return name or settings.get("name") or settings["root"].rstrip("/").rpartition("/")[2] or settings["source"]


def answer(config: Config, name: str, folder: str) -> list[dict]:
    """The predictions of one model on `evaluate.split`, in the order of the shards, with progress on the way."""
    options, cluster = config.evaluate, config.cluster
    found = groups(load_manifest(config.data.shards, [options.split]), options.split)
    size = max(1, options.images_per_batch // config.data.images_per_group)
    items = [{"groups": json.dumps([vars(g) for g in found[i : i + size]])} for i in range(0, len(found), size)]
    need_one("evaluate", cluster)
    quiet_data().execution_options.preserve_order = True
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        Answerer,  # type: ignore[arg-type]
        fn_constructor_args=(config, folder, name in options.blind),
        compute=ray.data.ActorPoolStrategy(size=min(cluster.workers, len(items))),
        num_cpus=0.5,
        num_gpus=1 if cluster.use_gpu else 0,
    )
    predictions: list[dict] = []
    set_aside: list[str] = []
    began, shown = time.time(), 0.0
    for done, row in enumerate(dataset.iter_rows(), start=1):
        predictions += json.loads(row["predictions"])
        set_aside += json.loads(row["set_aside"])
        if time.time() - shown > 5 or done == len(items):
            shown = time.time()
            rate = len(predictions) / (shown - began)
            left = (len(items) - done) * (shown - began) / done
            print(f"[evaluate] {name}: {len(predictions)} answers, {rate:.0f} a second, {left:.0f} s left", flush=True)
    if set_aside:
        print(f"[evaluate] {name}: {len(set_aside)} set aside; the first: {set_aside[0]}", flush=True)
    return predictions


def evaluate(config: Config) -> dict[str, dict]:
    """Scores of every model of `evaluate.models`; predictions and scores are written below run/evaluate and run/metrics.json.

    A model whose weights have been answered for with the same settings is not asked again.
    """
    files = open_folder(f"{config.run}/evaluate", create=True)
    write_text(open_folder(config.run), "config.yaml", as_yaml(config))
    scores: dict[str, dict] = {}
    apart: dict[str, dict] = {}
    for name, model in config.evaluate.models.items():
        if not (local(model, weights=False) / "config.json").is_file():
            raise ValueError(f"evaluate.models.{name}={model} holds no model; run the job that makes it, or take it off the list")
        file, asked = f"{name}.jsonl", f"{name}.json"
        digest = {**fingerprint(config, model), "blind": name in config.evaluate.blind, "name": config.data.name}
        if exists(files, file) and exists(files, asked) and read_json(files, asked) == digest:
            print(f"[evaluate] {name}: answered before, in {config.run}/evaluate/{file}", flush=True)
        else:
            if exists(files, asked):
                files.delete_file(asked)  # killed while writing, the answers must not pass for those of other settings
            predictions = answer(config, name, model)
            write_text(files, file, "".join(json.dumps(p) + "\n" for p in predictions))
            write_json(files, asked, digest)
        predictions = read_lines(files, file)
        counter_clockwise = config.evaluate.angle_counter_clockwise
        parts = metrics.by_benchmark(predictions)
        scores[name] = metrics.score(predictions, counter_clockwise)
        apart[name] = {
            part: metrics.score(found, counter_clockwise) if len(parts) > 1 else scores[name] for part, found in parts.items()
        }
    chance = constant_answers(predictions)
    summary: dict[str, dict] = {
        name: {**score["summary"], "detail": score, "benchmarks": apart[name]} for name, score in scores.items()
    }
    summary["constant_answer"] = chance
    write_json(open_folder(config.run), "metrics.json", summary)
    return scores


def constant_answers(predictions: list[dict]) -> dict[str, float]:
    """What a model reaches that knows the questions and not the image, %: the most frequent answer of each kind of question."""
    found = {}
    for task in ("scene_classification", "vqa"):
        kinds: dict[str, Counter] = {}
        for p in predictions:
            if p["task"] == task and (task != "vqa" or metrics.counts_in_moa(p)):
                kinds.setdefault(p["category"], Counter())[p["references"][0]] += 1
        if kinds:
            most = sum(counts.most_common(1)[0][1] for counts in kinds.values())
            found[task] = 100 * most / sum(counts.total() for counts in kinds.values())
    return found


def fingerprint(config: Config, model: str) -> dict:
    """What decides the answers of a model: its weights, the test shards and the decoding limits."""
    manifest = load_manifest(config.data.shards, [config.evaluate.split])
    shards = [shard["sha256"] for shard in manifest["splits"][config.evaluate.split]["shards"]]
    found = {"weights": assemble.weights_digest(model), "shards": shards, "max_response": config.evaluate.max_response}
    others = {"image_size": config.image_size, "precision": config.cluster.precision}
    return found | {key: value for key, value in others.items() if value not in (0, "fp32")}
