"""Raw data -> Parquet shards, manifest and tokenizer: python jobs/prepare.py --config FILE [key=value ...]"""

import sys

from geodistill.config import from_command_line


def main() -> int:
    """0: the shards are whole; 1: they cannot be made, with the reason on stderr."""
    config = from_command_line("prepare")
    from geodistill.cluster import connect
    from geodistill.data.shards import prepare

    try:
        connect()
        manifest = prepare(config, parallel=True)
    except ValueError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 1
    images = sum(split["images"] for split in manifest["splits"].values())
    print(f"{images} images in {config.data.shards}/manifest.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
