"""Pre-train the teacher's vision tower densely on generated scenes (the embedded data set only); writes run/tower."""

from geodistill.cli import settings
from geodistill.config import Config


def pretrain_job(config: Config) -> None:
    import torch

    from geodistill.data.files import exists, open_folder, written
    from geodistill.models.vision import new_tower, pretrain_tower

    folder = f"{config.run}/tower"
    if exists(open_folder(folder), "config.json"):
        print(f"[tower] finished before, in {folder}")
        return
    torch.manual_seed(config.seed)
    sizes, how = config.teacher.model.vision, config.tower
    tower = new_tower(sizes)
    pretrain_tower(tower, how.images, how.steps, how.images_per_step, how.learning_rate, sizes.feature_layer, how.seed)
    with written(folder) as here:
        tower.save_pretrained(here)
    print(f"[tower] done: {folder}")


if __name__ == "__main__":
    pretrain_job(settings("pretrain"))
