"""DOTA (and SODA-A, HRSC in its form): labelTxt/<image>.txt beside images/<image>.png, in a folder for each split or in one.

Lines `x1 y1 x2 y2 x3 y3 x4 y4 class difficult`, in pixels, below header lines `imagesource:`, `gsd:`. A folder named train,
val or test gives the split; otherwise a hash does. Of the published oriented and horizontal labels the oriented are read.
"""

from collections.abc import Iterator

from geodistill.data.record import BadRecord
from geodistill.data.sources.base import Item, folder_split
from geodistill.data.sources.detection import DetectionSource, Object, kind_of

_HEADERS = ("imagesource", "gsd", "acquisition")
_HORIZONTAL = ("hbb", "reclabel")  # in the name of a folder


class Dota(DetectionSource):
    def items(self) -> list[Item]:
        """One item an image. ValueError: no image with a label file."""
        labels = self.root.list((".txt",))
        oriented = [path for path in labels if not any(word in path.lower() for word in _HORIZONTAL)]
        return self.items_of(self.root.list(), oriented or labels, folder_split)

    def objects(self, item: Item, width: int, height: int) -> Iterator[Object | BadRecord]:
        """The objects of a label file; a line that is none is set aside."""
        for i, line in enumerate(self.lines(item)):
            words = line.split()
            if not words or words[0].partition(":")[0].lower() in _HEADERS:
                continue
            try:
                numbers = [float(word) for word in words[:8]]
                if len(numbers) < 8 or len(words) < 9:
                    raise ValueError
            except ValueError:
                yield BadRecord(item.id, f"line {i + 1}", f"{line[:60]!r} is not `x1 y1 ... x4 y4 class difficult`")
                continue
            corners = tuple(zip(numbers[::2], numbers[1::2], strict=True))
            yield Object(kind_of(words[8]), corners, words[9:10] not in ([], ["0"]))
