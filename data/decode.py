"""Decode image files to uint8 squares, with Pillow."""

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.Image import Transpose
from PIL.TiffImagePlugin import BITSPERSAMPLE, PLANAR_CONFIGURATION, SAMPLEFORMAT
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION as PHOTOMETRIC

BLOCK = 256  # images decoded ahead; bounds the memory
SOFTWARE = "byol"  # marks the PNG files that this project writes, which are never data
OURS = f"a picture made by {SOFTWARE}"
UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


def decode(path: Path, size: int) -> np.ndarray:
    """The image in a file, as `square` returns it; ValueError if this project wrote the file."""
    with Image.open(path) as image:
        if image.info.get("Software") == SOFTWARE:
            raise ValueError(OURS)
        image.draft(image.mode, (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4, 1/8 if enough
        return square(image, size)


def square(image: Image.Image, size: int) -> np.ndarray:
    """Upright center square, RGB on white, resized to `size`: (3, size, size) uint8.

    ValueError if the range of its pixels is unknown.  `image` may be open but not decoded yet.
    """
    if not _has_known_range(image):
        raise ValueError(
            "32-bit or signed pixels, whose range is unknown, or a 16-bit TIFF that Pillow "
            "decodes incorrectly: save it as PNG with 8 or 16 bits"
        )
    image.load()
    if (turn := _turn(image)) is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips them at 255
        values = np.asarray(image).clip(0, 65535)
        values[values == image.info.get("transparency", -1)] = 65535
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode_all(paths: list[Path], size: int) -> Iterator[np.ndarray | str]:
    """Yield each image as `decode` returns it, or the reason why it can't be decoded, in order.

    OSError if a file can't be read.
    """
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        for first in range(0, len(paths), BLOCK):
            yield from pool.map(lambda path: _try(path, size), paths[first : first + BLOCK])


def _try(path: Path, size: int) -> np.ndarray | str:
    try:
        return decode(path, size)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds, even SyntaxError and struct.error
        if isinstance(error, OSError) and error.errno:  # of the disk, not of the image
            raise
        return " ".join(str(error).split()) or type(error).__name__


def _has_known_range(image: Image.Image) -> bool:
    """Whether the pixels are unsigned, of 8 or 16 bits, and Pillow decodes them correctly."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    signed = 2 in tags.get(SAMPLEFORMAT, ())
    planes_or_inverted = tags.get(PLANAR_CONFIGURATION) == 2 or tags.get(PHOTOMETRIC) == 0
    misread = 16 in tags.get(BITSPERSAMPLE, ()) and planes_or_inverted
    # older releases of Pillow open 16-bit PNG and PGM as "I"
    wide = image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM"))
    return not (signed or misread or wide or image.format == "FITS")


def _turn(image: Image.Image) -> Transpose | None:
    """The transposition that EXIF asks for, if any; None if EXIF can't be read."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF raises many kinds; the pixels may be good
        return None
