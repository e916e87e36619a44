"""Satellite imagery -> what a picture model sees: 8 bits, one or three bands. GeoTIFF through rasterio."""

import io
import warnings

import numpy as np
import rasterio
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, TiffImageFile
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from geodistill.data.record import FORMATS, MAX_PIXELS, BadRecord

PERCENTILES = (2.0, 98.0)
# of GDAL; not those that read other files than the one they are given, or from other hosts
DRIVERS = ["GTiff", "JP2OpenJPEG", "PNG", "JPEG", "GIF", "BMP", "WEBP", "HFA", "NITF"]
_EIGHT_BIT = ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA")


def stretch(band_HW: np.ndarray, valid_HW: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Any numbers -> uint8: the lower limit becomes 0, the upper 255; invalid pixels are 0.

    limits: without them the 2nd and the 98th percentile of the valid pixels.
    """
    values = band_HW[valid_HW]
    if not values.size:
        return np.zeros(band_HW.shape, np.uint8)
    low, high = limits or np.percentile(values, PERCENTILES)
    scaled = (band_HW.astype(np.float64) - low) / max(high - low, 1e-12) * 255
    return np.where(valid_HW, np.clip(np.nan_to_num(scaled), 0, 255), 0).astype(np.uint8)


def strength(bands: np.ma.MaskedArray) -> np.ma.MaskedArray:
    """The amplitudes of complex numbers, as SAR has them before detection; other bands as they are."""
    return np.ma.abs(bands) if np.iscomplexobj(bands) else bands


def _deep(image: Image.Image, data: bytes) -> bool:
    """Has it more than 8 bits a band, of which Pillow would keep the upper ones?"""
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8
    return image.format == "PNG" and data[24] > 8  # the bit depth in its header


def _need_pixels(width: int, height: int, most: int, record: str) -> None:
    if width * height > most:
        raise BadRecord(record, "image", f"{width}x{height} pixels is over the limit of {most}")


def displayable(data: bytes, record: str, bands: list[int], max_pixels: int = MAX_PIXELS) -> tuple[bytes, int, int]:
    """(encoded image that Pillow shows truly, width, height in pixels).

    8-bit images that Pillow shows stay as they are. Others (16 bits, floats, more bands) are read by rasterio: the bands
    with the numbers `bands` (from 1; none: the first three, or the first) as PNG, each stretched on its own unless it has
    8 bits. Raises BadRecord.
    """
    if not data:
        raise BadRecord(record, "image", "is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _need_pixels(image.width, image.height, max_pixels, record)
            if image.mode in _EIGHT_BIT and not bands and not _deep(image, data):
                return data, image.width, image.height
    except Image.DecompressionBombError as error:
        raise BadRecord(record, "image", f"cannot be decoded ({error})") from error
    except BadRecord:
        raise
    except (OSError, SyntaxError, ValueError):
        pass  # Pillow does not know it; rasterio may
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.MemoryFile(data) as memory, memory.open(driver=DRIVERS) as raster:
                _need_pixels(raster.width, raster.height, max_pixels, record)
                wanted = bands or ([1, 2, 3] if raster.count >= 3 else [1])
                if max(wanted) > raster.count:
                    reason = f"has {raster.count} bands, but data.bands asks for {max(wanted)}"
                    raise BadRecord(record, "image", reason)
                read = strength(raster.read(wanted, masked=True))
    except (RasterioError, OSError, ValueError) as error:
        if isinstance(error, BadRecord):
            raise
        raise BadRecord(record, "image", "cannot be decoded (not an image that Pillow or GDAL knows)") from error
    valid = ~np.ma.getmaskarray(read) & np.isfinite(read.data)
    shown = [
        np.where(mask, band, 0).astype(np.uint8) if band.dtype == np.uint8 else stretch(band, mask)
        for band, mask in zip(read.data, valid, strict=True)
    ]
    picture = Image.fromarray(shown[0] if len(shown) == 1 else np.stack((shown * 3)[:3] if len(shown) == 2 else shown[:3], -1))
    return encode(picture), picture.width, picture.height


def encode(image: Image.Image) -> bytes:
    """PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
