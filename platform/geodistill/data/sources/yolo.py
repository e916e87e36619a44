"""YOLO: <image>.txt beside the image or below labels/, lines `class cx cy w h` or `class x1 y1 ... x4 y4`, all 0 to 1.

Class names, below data.root: *.names or classes.txt, one a line, or *.yaml with `names:`. A folder named train, val or test
gives the split; otherwise a hash does.
"""

from collections.abc import Iterator

from omegaconf import OmegaConf

from geodistill.config import DataConfig
from geodistill.data.record import BadRecord
from geodistill.data.sources.base import Item, folder_split
from geodistill.data.sources.detection import DetectionSource, Object, kind_of


class Yolo(DetectionSource):
    def __init__(self, data: DataConfig):
        super().__init__(data)
        lists = self.root.list((".names", "classes.txt", ".yaml", ".yml"))
        if not lists:
            raise ValueError(f"no *.names, classes.txt or *.yaml below data.root={data.root}: it names the classes, one a line")
        self.names_file = lists[0]
        self.kinds = self._names()

    def _names(self) -> dict[int, str]:
        text = self.root.text(self.names_file)
        if not self.names_file.lower().endswith((".yaml", ".yml")):
            return dict(enumerate(kind_of(line) for line in text.splitlines() if line.strip()))
        raw = OmegaConf.to_container(OmegaConf.create(text))
        names = raw.get("names") if isinstance(raw, dict) else None
        if not names or not isinstance(names, dict | list):
            raise ValueError(f"{self.names_file} has no `names:`, a list of the classes; correct it or add classes.txt")
        return {int(i): kind_of(str(name)) for i, name in (names.items() if isinstance(names, dict) else enumerate(names))}

    def items(self) -> list[Item]:
        """One item an image. ValueError: no image with a label file."""
        labels = [path for path in self.root.list((".txt",)) if path != self.names_file]
        return self.items_of(self.root.list(), labels, folder_split)

    def objects(self, item: Item, width: int, height: int) -> Iterator[Object | BadRecord]:
        """The objects of a label file; a line that is none is set aside."""
        for i, line in enumerate(self.lines(item)):
            words = line.split()
            if not words:
                continue
            try:
                kind, numbers = self.kinds[int(words[0])], [float(word) for word in words[1:]]
                if len(numbers) not in (4, 8):
                    raise ValueError
            except (ValueError, KeyError):
                reason = f"{line[:60]!r} is not `class cx cy w h` of one of the {len(self.kinds)} classes of {self.names_file}"
                yield BadRecord(item.id, f"line {i + 1}", reason)
                continue
            if len(numbers) == 4:
                cx, cy, w, h = numbers
                numbers = [cx - w / 2, cy - h / 2, cx + w / 2, cy - h / 2, cx + w / 2, cy + h / 2, cx - w / 2, cy + h / 2]
            yield Object(kind, tuple((x * width, y * height) for x, y in zip(numbers[::2], numbers[1::2], strict=True)))
