"""Images on their way in: what a model sees of them, what a browser can show, and scenes to try."""

import functools

import numpy as np

from geodistill.data import synthetic
from geodistill.data.imagery import displayable, encode
from geodistill.data.record import BadRecord, open_image
from geodistill.data.scenes import Scene, Tile
from geodistill.data.stream import square
from serving.openai import Refused

PREVIEW, LONGEST = 1024, 4096  # pixels of a side
SAMPLES, SAMPLES_SEED = 8, 7


def see(data: bytes, size: int, max_pixels: int) -> tuple[np.ndarray, int, int]:
    """Encoded image -> (uint8 [size, size, 3] as the model sees it, width, height in pixels). Raises Refused."""
    try:
        shown, width, height = displayable(data, "image_url", [], max_pixels)
        picture = open_image(shown, "image_url")
    except BadRecord as error:
        raise Refused(400, f"image_url: {error.reason}", "image_url") from error
    if max(picture.size) > LONGEST:  # a strip would be padded to a square of its longer side
        picture.thumbnail((LONGEST, LONGEST))
    return square(picture, size), width, height


def see_tile(scene: Scene, tile: Tile, size: int) -> np.ndarray | None:
    """A tile of a scene as the model sees it, uint8 [size, size, 3]; None where there is nothing."""
    image = scene.read(tile)
    return None if image is None else square(image, size)


def preview_of(data: bytes, max_pixels: int) -> tuple[bytes, int, int]:
    """Encoded image -> (PNG of at most PREVIEW pixels a side, width, height of the whole). Raises Refused."""
    try:
        shown, width, height = displayable(data, "image", [], max_pixels)
        picture = open_image(shown, "image")
    except BadRecord as error:
        raise Refused(400, f"image: {error.reason}") from error
    picture.thumbnail((PREVIEW, PREVIEW))
    return encode(picture), width, height


@functools.cache
def sample_scenes() -> list[tuple[synthetic.Scene, bytes]]:
    """Some scenes of the embedded data set, as PNG."""
    found = (synthetic.make_scene(SAMPLES_SEED, "samples", i)[:2] for i in range(SAMPLES))
    return [(scene, encode(picture)) for scene, picture in found]
