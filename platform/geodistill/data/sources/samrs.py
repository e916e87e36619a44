"""SAMRS (SOTA, SIOR, FAST) as a detection set: ins/<image>.pkl over the image files; the masks are not read.

A file holds a list of {"category", "bbox": [x1, y1, x2, y2], "mask", "label", "size"} (SOTA, SIOR) or with "rbox": four
corners and "rhbox" (FAST), in pixels; the boxes are those of DOTA, DIOR and FAIR1M. A pickle can run any program, so it is
read by an unpickler that knows lists, numbers, texts and numpy arrays only; <image>.json of the same form goes before it.
"""

import io
import json
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

from geodistill.data.record import BadRecord
from geodistill.data.sources.base import Item, folder_split
from geodistill.data.sources.detection import DetectionSource, Object, kind_of, stem_of

_MASKS = {"gray", "color"}  # folders of rasters with the images' names
_ARRAYS = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        now = module.replace("numpy.core", "numpy._core")  # numpy 1 wrote the published files
        if (now, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return super().find_class(module if int(np.__version__[0]) < 2 else now, name)


class Samrs(DetectionSource):
    def items(self) -> list[Item]:
        """One item an image. ValueError: no image with a file of instances."""
        images = [path for path in self.root.list() if _MASKS.isdisjoint(path.lower().split("/"))]
        plain = self.root.list((".json",))
        have = set(map(stem_of, plain))
        pickles = [path for path in self.root.list((".pkl",)) if stem_of(path) not in have]
        return self.items_of(images, plain + pickles, folder_split)

    def objects(self, item: Item, width: int, height: int) -> Iterator[Object | BadRecord]:
        """The objects of a file; one without a category or a box is set aside."""
        data, name = self.labels(item), item.ref["labels"]
        try:
            found = json.loads(data) if name.endswith(".json") else _Arrays(io.BytesIO(data)).load()
        except Exception as error:  # a broken or hostile pickle raises nearly anything
            raise BadRecord(item.id, "labels", f"{name} cannot be read as lists, texts and arrays ({error})") from error
        if not isinstance(found, list):
            raise BadRecord(item.id, "labels", f"{name} holds no list of instances")
        for i, one in enumerate(found):
            try:
                if not isinstance(one, dict) or not isinstance(one.get("category"), str):
                    raise ValueError("has no category")
                box = next((one[key] for key in ("rbox", "bbox", "rhbox", "hbox") if one.get(key) is not None), ())
                numbers = np.asarray(box, dtype=float).ravel().tolist()
                if len(numbers) not in (4, 8):
                    raise ValueError("has neither an rbox of four corners nor a bbox of four numbers")
                if len(numbers) == 4:
                    x1, y1, x2, y2 = numbers
                    numbers = [x1, y1, x2, y1, x2, y2, x1, y2]
                yield Object(kind_of(one["category"]), tuple(zip(numbers[::2], numbers[1::2], strict=True)))
            except (TypeError, ValueError) as error:
                yield BadRecord(item.id, f"instances[{i}]", str(error))
