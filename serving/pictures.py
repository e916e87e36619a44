"""Images on their way in: what a model sees of them, what a browser can show, and scenes to try."""

import functools
import struct
from contextlib import suppress

from PIL import Image, ImageOps

from geodistill.data import synthetic
from geodistill.data.imagery import displayable, encode
from geodistill.data.record import BadRecord, open_image
from serving.openai import Refused

PREVIEW, LONGEST = 1024, 4096  # pixels of a side
SAMPLES, SAMPLES_SEED = 8, 7


def opened(data: bytes, max_pixels: int, field: str = "image_url") -> tuple[Image.Image, int, int]:
    """Encoded image -> (RGB, upright as a browser shows it and LONGEST pixels a side at most; width, height of the whole in
    pixels). Raises Refused."""
    try:
        shown, width, height = displayable(data, field, [], max_pixels)
        picture = open_image(shown, field)
    except BadRecord as error:
        raise Refused(400, f"{field}: {error.reason}", field) from error
    with suppress(OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):  # what a broken EXIF says is passed over
        upright = ImageOps.exif_transpose(picture)
        if upright.size != picture.size:
            width, height = height, width
        picture = upright
    if max(picture.size) > LONGEST:  # a strip would be padded to a square of its longer side
        picture.thumbnail((LONGEST, LONGEST))
    return picture, width, height


def preview_of(data: bytes, max_pixels: int) -> tuple[bytes, int, int]:
    """Encoded image -> (PNG of at most PREVIEW pixels a side, width, height of the whole). Raises Refused."""
    picture, width, height = opened(data, max_pixels, "image")
    picture.thumbnail((PREVIEW, PREVIEW))
    return encode(picture), width, height


@functools.cache
def sample_scenes() -> list[tuple[synthetic.Scene, bytes]]:
    """Some scenes of the embedded data set, as PNG."""
    found = (synthetic.make_scene(SAMPLES_SEED, "samples", i)[:2] for i in range(SAMPLES))
    return [(scene, encode(picture)) for scene, picture in found]
