"""Detection sets in XML: DIOR (horizontal), DIOR-R (oriented) and FAIR1M.

DIOR: <object><name/><bndbox><xmin/>...</bndbox></object>; DIOR-R: <robndbox><x_left_top/><y_left_top/>...</robndbox>, the
files below "Horizontal Bounding Boxes" and "Oriented Bounding Boxes"; FAIR1M: <objects><object><possibleresult><name/>
</possibleresult><points><point>x,y</point>...</points></object></objects>, where points may be negative.
{train,val,test}.txt below ImageSets or Main, or a folder of that name, gives the split; otherwise a hash does.
"""

from collections.abc import Iterator
from xml.etree import ElementTree

from geodistill.data.record import BadRecord
from geodistill.data.sources.base import Item, folder_split
from geodistill.data.sources.detection import DetectionSource, Object, kind_of, stem_of

_CORNERS = ("left_top", "right_top", "right_bottom", "left_bottom")


def _numbers(parent: ElementTree.Element, names: list[str]) -> list[float]:
    found = [parent.findtext(name) for name in names]
    missing = [name for name, text in zip(names, found, strict=True) if text is None]
    if missing:
        raise ValueError(f"<{missing[0]}> is missing")
    return [float(text) for text in found if text is not None]


class VocXml(DetectionSource):
    """DIOR, DIOR-R and FAIR1M alike: the elements of a file say which it is."""

    def items(self) -> list[Item]:
        """One item an image. ValueError: no image with an annotation file."""
        every, word = self.root.list((".xml",)), "horizontal" if self.data.horizontal else "oriented"
        wanted = [path for path in every if word in path.lower()]
        have = set(map(stem_of, wanted))
        listed: dict[str, str] = {}
        for path in self.root.list((".txt",)):
            if stem_of(path) in ("train", "val", "test") and not {"imagesets", "main"}.isdisjoint(path.lower().split("/")):
                listed |= dict.fromkeys(self.root.read(path).decode(errors="replace").split(), stem_of(path))

        def split(path: str) -> str:
            return listed.get(stem_of(path), "") or folder_split(path)

        return self.items_of(self.root.list(), wanted + [path for path in every if stem_of(path) not in have], split)

    def objects(self, item: Item, width: int, height: int) -> Iterator[Object | BadRecord]:
        """The objects of a file; one without a name or a box is set aside."""
        try:
            tree = ElementTree.fromstring(self.labels(item))
        except (ElementTree.ParseError, ValueError) as error:
            raise BadRecord(item.id, "labels", f"{item.ref['labels']} is not XML ({error})") from error
        for i, node in enumerate(tree.iter("object")):
            try:
                name = (node.findtext("name") or node.findtext("possibleresult/name") or "").strip()
                if not name:
                    raise ValueError("<name> is missing")
                difficult = (node.findtext("difficult") or "0").strip() not in ("0", "")
                yield Object(kind_of(name), self._corners(node), difficult)
            except ValueError as error:
                yield BadRecord(item.id, f"object[{i}]", str(error))

    @staticmethod
    def _corners(node: ElementTree.Element) -> tuple[tuple[float, float], ...]:
        oriented, box, points = node.find("robndbox"), node.find("bndbox"), node.findall("points/point")
        if points:
            pairs = [tuple(float(v) for v in (p.text or "").split(",")) for p in points[:4]]
            if len(pairs) < 4 or any(len(p) != 2 for p in pairs):
                raise ValueError("<points> holds no four points x,y")
            return tuple((p[0], p[1]) for p in pairs)
        if oriented is not None and oriented.find("x_left_top") is not None:
            numbers = _numbers(oriented, [f"{axis}_{corner}" for corner in _CORNERS for axis in "xy"])
            return tuple(zip(numbers[::2], numbers[1::2], strict=True))
        holder = box if box is not None else oriented
        if holder is None:
            raise ValueError("has neither <bndbox>, <robndbox> nor <points>")
        x1, y1, x2, y2 = _numbers(holder, ["xmin", "ymin", "xmax", "ymax"])
        return ((x1, y1), (x2, y1), (x2, y2), (x1, y2))
