"""Raw data -> Parquet shards, manifest and tokenizer."""

from geodistill.cli import main
from geodistill.config import Config
from geodistill.rules import need_source


def prepare_job(config: Config) -> None:
    from geodistill.data.prepare import prepare

    manifest = prepare(config, parallel=True)
    images = sum(split["images"] for split in manifest["splits"].values())
    print(f"{images} images in {config.data.shards}/manifest.json")


if __name__ == "__main__":
    main("prepare", prepare_job, check=need_source)
