"""The same image twice: within a split, or in training and test. Exact copies by SHA-256, near ones by perceptual hash.

The perceptual hash (imagehash's phash) has 64 bits that say which low frequencies of the grey image lie above their median:
a copy that was saved again, resized or slightly edited differs in a few of them, another image in about 32.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import imagehash
import numpy as np
import pyarrow as pa

from geodistill.data.record import ImageRecord, open_image

ORDER = ("test", "val", "train", "unlabelled")  # of two copies, the one in the later split is the one too many
SCHEMA = pa.schema([(name, pa.string()) for name in ("kind", "split", "id", "also_in", "also_as")] + [("bits", pa.int32())])
_BITS = 64


@dataclass(frozen=True)
class Fingerprint:
    """What tells an image from others. phash: 64 bits."""

    split: str
    id: str
    sha256: str
    phash: int


@dataclass(frozen=True)
class Copy:
    """Image `id` of `split` shows the same as image `also_as` of `also_in`, the first of its kind. bits: that differ."""

    kind: str  # exact | perceptual
    split: str
    id: str
    also_in: str
    also_as: str
    bits: int

    @property
    def leaks(self) -> bool:
        """Is it in training, or validation, and held out as well?"""
        return self.split != self.also_in and not {self.split, self.also_in} <= {"train", "unlabelled"}


def fingerprint(record: ImageRecord) -> list[str]:
    """[id, SHA-256, perceptual hash as hexadecimal text] of a valid record."""
    phash = imagehash.phash(open_image(record.image, record.id))
    return [record.id, hashlib.sha256(record.image).hexdigest(), str(phash)]


def find_copies(images: Iterable[Fingerprint], bits: int) -> list[Copy]:
    """Every image of which an earlier one (test before val before training, then by id) is a copy, with the first such one.

    bits: perceptual hashes that differ in so many of 64 bits at most are alike; below 0: exact copies only.
    """
    ordered = sorted(images, key=lambda image: (ORDER.index(image.split), image.id))
    alike = _first_alike(np.array([image.phash for image in ordered], np.uint64), bits) if bits >= 0 and ordered else None
    first: dict[str, Fingerprint] = {}
    copies = []
    for i, image in enumerate(ordered):
        same, near = first.setdefault(image.sha256, image), ordered[alike[i]] if alike is not None else image
        if same is not image and (near is image or near.split == same.split):
            copies.append(Copy("exact", image.split, image.id, same.split, same.id, 0))
        elif near is not image:  # the same bytes may be in training, and a near copy of them in the test
            differ = (image.phash ^ near.phash).bit_count()
            copies.append(Copy("perceptual", image.split, image.id, near.split, near.id, differ))
    return copies


def _first_alike(hashes: np.ndarray, bits: int) -> np.ndarray:
    """For each of [n] hashes the least index of one that differs in `bits` bits at most, itself included.

    Two hashes that differ in k bits agree in one of k + 1 bands at least, so only hashes with a common band are compared.
    """
    unique, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    best = first.copy()
    edges = np.linspace(0, _BITS, bits + 2).astype(np.uint64)
    for low, high in pairwise(edges):
        band = (unique >> low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(band[order]) != 0, True])
        for start, end in pairwise(starts):
            bucket = order[start:end]
            for at in range(0, len(bucket), 1024) if len(bucket) > 1 else ():
                rows = bucket[at : at + 1024]
                alike = np.bitwise_count(unique[rows, None] ^ unique[None, bucket]) <= bits
                found = np.where(alike, first[bucket], len(hashes)).min(1)
                best[rows] = np.minimum(best[rows], found)
    return best[which]


def summary(copies: list[Copy]) -> dict[str, int]:
    """ "exact: train, also in test" -> how many."""
    counts = Counter(f"{c.kind}: {c.split}, also in {c.also_in}" for c in copies)
    return dict(sorted(counts.items()))
