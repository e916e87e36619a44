"""Images that clients send: what is broken, hostile or too large is refused with a reason, and nothing else happens."""

import io
import random

import numpy as np
import pytest
import rasterio
from PIL import Image

from geodistill.data.stream import square
from serving.openai import Refused
from serving.pictures import opened, preview_of, sample_scenes


def see(data: bytes, size: int, most: int):
    picture, width, height = opened(data, most)
    return square(picture, size), width, height


def encoded(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)
    if kind == "GTiff16":
        with rasterio.MemoryFile() as memory:
            with memory.open(driver="GTiff", width=60, height=40, count=3, dtype="uint16") as raster:
                raster.write(pixels.transpose(2, 0, 1).astype("uint16") * 40)
            return memory.read()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP", "GTiff16", "PPM"])
def test_broken_images(kind):
    whole = encoded(kind)
    pixels, width, height = see(whole, 32, 10**6)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8 and min(width, height) > 0
    rng, refused = random.Random(0), 0
    for i in range(80):
        data = bytearray(whole)
        if i % 2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.choice((1, 4, 30))):
                data[rng.randrange(min(len(data), rng.choice((64, 10**6))))] = rng.randrange(256)
        try:
            pixels, *_ = see(bytes(data), 32, 10**6)
            assert pixels.shape == (32, 32, 3)
        except Refused as error:
            assert error.status == 400 and error.message
            refused += 1
    assert refused > 10


def test_images_that_would_fill_the_memory():
    buffer = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 100_000
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", width=20_000, height=20_000, count=5, dtype="uint16", sparse_ok=True):
            pass
        sparse = memory.read()
    for data in (buffer.getvalue(), sparse):
        for look in (lambda data: see(data, 32, 10**6), lambda data: preview_of(data, 10**6)):
            with pytest.raises(Refused, match="over the limit"):
                look(data)
    strip = io.BytesIO()
    Image.new("L", (60_000, 1)).save(strip, "PNG")  # a square of its side would take gigabytes
    assert see(strip.getvalue(), 32, 10**6)[0].shape == (32, 32, 3)
    icon = io.BytesIO()
    Image.new("L", (256, 256)).save(icon, "ICO")
    for data in (b"", icon.getvalue()):
        with pytest.raises(Refused):
            see(data, 32, 10**6)


def test_samples_are_pictures():
    for scene, data in sample_scenes():
        assert scene.name and see(data, 64, 10**6)[1:] == (64, 64)


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (39, 19)), (6, (19, 0)), (8, (0, 39))])
def test_a_turned_photograph_is_seen_upright(orientation, corner):
    """As browsers show it, where boxes are drawn: EXIF's orientation is applied, to the sides too."""
    picture = Image.new("RGB", (40, 20))
    picture.paste((255, 255, 255), (0, 0, 8, 8))
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    picture.save(buffer, "JPEG", exif=exif, quality=100)
    upright, width, height = opened(buffer.getvalue(), 10**6)
    assert upright.size == (width, height) == ((20, 40) if orientation > 4 else (40, 20))
    assert (
        min(upright.getpixel(corner)) > 200
        and sum(np.asarray(upright.convert("L"))[i, j] > 128 for i in (0, -1) for j in (0, -1)) == 1
    )
    assert preview_of(buffer.getvalue(), 10**6)[1:] == (width, height)
