"""Store the features that a frozen vision tower gives for every image of the shards; tells whether that pays."""

from geodistill.cli import main
from geodistill.config import Config, ConfigError
from geodistill.train.stage import stages


def need_folder(config: Config) -> None:
    if not config.features:
        raise ConfigError("features is empty: name the folder to write to, local or s3://, here and for the stages that read it")


def features_job(config: Config) -> None:
    from geodistill.data.features import break_even, store_features
    from geodistill.data.shards import load_manifest

    found = store_features(config)
    print(f"{found['images']} images, {found['bytes'] / 1e9:.3g} GB: {config.features}/manifest.json")
    if not found["milliseconds"]:
        print("nothing was computed in this run, so no times were measured")
        return
    parts = {part: f"{value:.3g}" for part, value in found["milliseconds"].items()}
    print(
        f"an image: decoding {parts['decoding']} ms, tower {parts['tower']} ms, writing {parts['writing']} ms, reading back "
        f"{parts['reading']} ms, {found['image_bytes'] / 1e6:.3g} MB"
    )
    least = found["image_bytes"] / 1000 / (found["milliseconds"]["decoding"] + found["milliseconds"]["tower"])
    print(f"storage must give each worker more than {least:.3g} MB/s, or reading back takes longer than decoding and the tower")
    make, save = "decoding + tower + writing", "decoding + tower - reading back"
    uses = break_even(found["milliseconds"])
    if uses == float("inf"):
        print("they never pay here: it gives less")
    else:
        print(f"they pay when each image is used more than {uses:.2f} times: ({make}) / ({save})")
    splits = load_manifest(config.data.shards)["splits"]
    for stage in [*stages(config, "finetune"), *stages(config, "distill")]:
        images = sum(splits.get(split, {"images": 0})["images"] for split in stage.train.splits)
        print(f"  {stage.name} uses each about {stage.train.steps * stage.train.images_per_step / max(images, 1):.1f} times")


if __name__ == "__main__":
    main("features", features_job, check=need_folder)
