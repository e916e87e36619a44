"""Raw data sets -> ImageRecords. To add one: a file here with `items` and `make`, and a line in SOURCES."""

from geodistill.config import DataConfig
from geodistill.data.sources.base import Item, Source
from geodistill.data.sources.class_folders import ClassFolders
from geodistill.data.sources.llava import Llava
from geodistill.data.sources.synthetic import Synthetic

SOURCES: dict[str, type[Source]] = {"synthetic": Synthetic, "class_folders": ClassFolders, "llava": Llava}

__all__ = ["SOURCES", "Item", "Source", "open_source"]


def open_source(data: DataConfig) -> Source:
    """The source that data.source names."""
    return SOURCES[data.source](data)
