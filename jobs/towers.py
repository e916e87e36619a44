"""Does a ConvNet beside the ViT pay? EarthGPT's tower against CLIP's alone, at the same training FLOPs (make towers).

The run's own model (make earthgpt) has the joined tower. A second one, below run/towers/clip, goes through the same training on
the same data with `CLIP` in place of it: more layers of the ViT for what the ConvNet costs. Both answer the same test split.
"""

from dataclasses import replace

from finetune import finetune_job
from pretrain import pretrain_job

from geodistill.cli import main
from geodistill.config import Config, changed

CLIP = ("vision.conv_widths=[]", "vision.conv_depths=[]", "vision.layers=5")
TOLERANCE = 0.02  # share by which the training FLOPs may differ


def with_clip(config: Config) -> Config:
    """The same settings with CLIP's tower alone, and a run folder of its own."""
    run = f"{config.run}/towers/clip"
    both = [f"{role}.model.{key}" for role in ("teacher", "student") for key in (f"tower={run}/tower", *CLIP)]
    return changed(config, [f"run={run}", *both])


def cost(config: Config) -> dict[str, float]:
    """What a tower costs: its FLOPs by torch's counter, those of the stages by the rule of train/plan.py.

    A backward pass of the tower counts as two forward: the counter overstates the gradient of a grouped convolution.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from geodistill.models.vision import DenseHeads, new_tower
    from geodistill.train.plan import work
    from geodistill.train.stage import stages

    sizes, how = config.teacher.model.vision, config.tower
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower = new_tower(sizes)
        pixels = torch.empty(1, 3, sizes.image_size, sizes.image_size)
        features = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[sizes.feature_layer][:, 1:]
        alone = counter.get_total_flops()
        DenseHeads(tower.config.hidden_size).patch(features)
    total = 3 * counter.get_total_flops() * how.images_per_step * how.steps
    planned = changed(config, ["teacher.model.tower=", "student.model.tower="])  # by the sizes: there is no folder yet
    for stage in [s for role in ("blind", "teacher") for s in stages(replace(planned, role=role), "finetune")]:
        total += stage.train.steps * config.cluster.workers * sum(part.flops for part in work(planned, stage).values())
    parameters = sum(p.numel() for p in tower.parameters()) / 1e6
    return {"parameters (M)": parameters, "MFLOPs an image": alone / 1e6, "training TFLOPs": total / 1e12}


def train(config: Config) -> str:
    """What `make earthgpt` does once the data are prepared, skipping what is finished; returns the model's folder."""
    pretrain_job(config)
    finetune_job(replace(config, role="blind"))
    finetune_job(changed(config, ["role=teacher", f"teacher.model.init={config.run}/blind/model"]))
    return f"{config.run}/teacher/model"


def towers_job(config: Config) -> None:
    from geodistill.data.files import open_folder, write_json, write_text
    from geodistill.evaluate.benchmarks import evaluate
    from geodistill.evaluate.compare import measure, paired_table
    from geodistill.evaluate.metrics import columns
    from geodistill.evaluate.report import answers_of_run

    variants = {"CLIP": with_clip(config), "ViT + ConvNet": config}
    rows = {name: cost(variant) for name, variant in variants.items()}
    low, high = sorted(row["training TFLOPs"] for row in rows.values())
    if high > (1 + TOLERANCE) * low:
        raise ValueError(f"training takes {low:.1f} and {high:.1f} TFLOPs: give CLIP in jobs/towers.py nearer sizes")
    asked = replace(config.evaluate, models={name: train(variant) for name, variant in variants.items()})
    apart = replace(config, run=f"{config.run}/towers", evaluate=asked)
    scores = evaluate(apart)
    for name, score in scores.items():
        rows[name] |= {column: score["summary"][key] for column, key in columns(scores).items()}
        rows[name]["grounding (acc@0.5)"] = score["grounding"]["acc@0.5"]
    cells = [["tower", *rows["CLIP"]], ["---"] * (1 + len(rows["CLIP"]))]
    cells += [[name, *(f"{value:.{2 if '(M)' in key else 1}f}" for key, value in row.items())] for name, row in rows.items()]
    text = "\n".join(f"| {' | '.join(line)} |" for line in cells)
    write_json(open_folder(apart.run), "towers.json", rows)
    write_text(open_folder(apart.run), "towers.md", text + "\n")
    clip, joined = (measure(found) for found in answers_of_run(apart).values())
    print(f"\n{paired_table(('ViT + ConvNet', 'CLIP'), joined, clip).text()}\n\n{text}\n\nwritten: {apart.run}/towers.md")


if __name__ == "__main__":
    main("towers", towers_job)
