"""The embedded data set as a source: nothing to read, every record is a function of (data.seed, split, index)."""

from collections.abc import Iterator

from geodistill.config import DataConfig
from geodistill.data import synthetic
from geodistill.data.record import ImageRecord
from geodistill.data.sources.base import Item


class Synthetic:
    def __init__(self, data: DataConfig):
        self.data = data

    def items(self) -> list[Item]:
        """data.train, data.unlabelled, data.val and data.test images."""
        return [
            Item(split, f"{split}-{i:06d}", {"seed": self.data.seed, "index": i})
            for split in synthetic.SPLITS
            for i in range(getattr(self.data, split))
        ]

    def make(self, item: Item) -> Iterator[ImageRecord]:
        yield synthetic.make_record(item.ref["seed"], item.split, item.ref["index"])
