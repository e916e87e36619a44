"""Raw data sets -> ImageRecords. To add one: a file here with `items` and `make`, a line in SOURCES, its name in config.py."""

from geodistill.config import DataConfig
from geodistill.data.sources.base import Item, Source
from geodistill.data.sources.captions import Captions
from geodistill.data.sources.class_folders import ClassFolders
from geodistill.data.sources.coco import Coco
from geodistill.data.sources.dota import Dota
from geodistill.data.sources.floodnet import FloodNet
from geodistill.data.sources.geochat_bench import GeoChatBench
from geodistill.data.sources.llava import Llava
from geodistill.data.sources.rsvqa import Rsvqa
from geodistill.data.sources.samrs import Samrs
from geodistill.data.sources.synthetic import Synthetic
from geodistill.data.sources.voc import VocXml
from geodistill.data.sources.yolo import Yolo

SOURCES: dict[str, type[Source]] = {
    "synthetic": Synthetic,
    "class_folders": ClassFolders,
    "llava": Llava,
    "geochat_bench": GeoChatBench,
    "rsvqa": Rsvqa,
    "floodnet": FloodNet,
    "captions": Captions,
    "dota": Dota,
    "dior": VocXml,
    "fair1m": VocXml,
    "samrs": Samrs,
    "yolo": Yolo,
    "coco": Coco,
}

__all__ = ["SOURCES", "Item", "Source", "open_source"]


def open_source(data: DataConfig) -> Source:
    """The source that data.source names."""
    return SOURCES[data.source](data)
