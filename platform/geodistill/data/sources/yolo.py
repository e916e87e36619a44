"""YOLO: <image>.txt beside the image or below labels/, lines `class cx cy w h` or `class x1 y1 ... x4 y4`, all 0 to 1.

Class names: a file *.names or classes.txt, one a line, below data.root. A first folder named train, val or test gives the
split; otherwise a hash does.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord
from geodistill.data.sources.base import Item
from geodistill.data.sources.detection import DetectionSource, Object, folder_split


class Yolo(DetectionSource):
    def __init__(self, data: DataConfig):
        super().__init__(data)
        lists = [p for p in self.root.list((".names", "classes.txt"))]
        if not lists:
            raise ValueError(f"no *.names or classes.txt below data.root={data.root}: it names the classes, one a line")
        self.names_file = lists[0]
        self.kinds = [line.strip() for line in self.root.text(lists[0]).splitlines() if line.strip()]

    def items(self) -> list[Item]:
        """One item an image. ValueError: no image with a label file."""
        labels = {PurePosixPath(path).stem: path for path in self.root.list((".txt",)) if path != self.names_file}
        return self.items_of(self.root.list(), labels, folder_split)

    def objects(self, item: Item, width: int, height: int) -> Iterator[Object | BadRecord]:
        """The objects of a label file; a line that is none is set aside."""
        for i, line in enumerate(self.root.text(item.ref["labels"]).splitlines()):
            words = line.split()
            if not words:
                continue
            try:
                kind, numbers = self.kinds[int(words[0])], [float(word) for word in words[1:]]
                if len(numbers) not in (4, 8) or int(words[0]) < 0:
                    raise ValueError
            except (ValueError, IndexError):
                reason = f"{line[:60]!r} is not `class cx cy w h` of one of the {len(self.kinds)} classes of {self.names_file}"
                yield BadRecord(item.id, f"line {i + 1}", reason)
                continue
            if len(numbers) == 4:
                cx, cy, w, h = numbers
                numbers = [cx - w / 2, cy - h / 2, cx + w / 2, cy - h / 2, cx + w / 2, cy + h / 2, cx - w / 2, cy + h / 2]
            yield Object(kind, tuple((x * width, y * height) for x, y in zip(numbers[::2], numbers[1::2], strict=True)))
