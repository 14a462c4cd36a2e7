"""Image files as uint8 squares, by Pillow."""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin

BLOCK = 256  # files in flight, which bounds the memory
SOFTWARE = "byol"  # in the PNG files that this project writes; they are no data
OURS = f"a picture made by {SOFTWARE}"
T = Image.Transpose
UPRIGHT = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
           6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90}  # by EXIF's orientation  # fmt: skip


class Decoded(NamedTuple):
    """(3, size, size) uint8, and the largest value of a 16-bit image in 0..1, else None."""

    pixels: np.ndarray
    peak: float | None


def decode(path: Path, size: int) -> Decoded:
    """The image upright, RGB on white, short side `size`, centre square.

    ValueError where the range of its pixels is unknown, where it is too large, and where this
    project has made it.
    """
    with _open(path) as image:
        if image.info.get("Software") == SOFTWARE:
            raise ValueError(OURS)
        whole = image.width * image.height
        image.draft(image.mode, (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4 or 1/8 if enough
        # a JPEG of several scans is held whole, whatever it is decoded at
        held = max(image.width * image.height, whole // 2 if _several_scans(image) else 0)
        if held > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{whole:,} pixels: too many to decode, save it smaller")
        return square(image, size)


def square(image: Image.Image, size: int) -> Decoded:
    """Upright, RGB on white, short side `size`, centre square; `image` may not be decoded yet.

    ValueError where the range of its pixels is unknown.
    """
    deep, peak = _sixteen_bits(image), None
    image.load()
    if (turn := _orientation(image)) > 1:
        image = image.transpose(UPRIGHT[turn])
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits at 255
        values = np.asarray(image).clip(0, 65535)
        peak = values.max() / 65535
        values[values == image.info.get("transparency", -1)] = 65535
        image = Image.fromarray((values // 257).astype(np.uint8))
    elif deep:  # Pillow keeps the upper 8 bits
        peak = np.asarray(image.convert("RGB")).max() / 255
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    return Decoded(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)), peak)


def decode_all(paths: list[Path], size: int) -> Iterator[Decoded | str]:
    """The images in order, or why one cannot be read; BLOCK of them are in flight."""
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for first in range(0, len(paths), BLOCK):
            yield from pool.map(lambda path: _try(path, size), paths[first : first + BLOCK])


def _try(path: Path, size: int) -> Decoded | str:
    """The image, or why it cannot be read."""
    try:
        return decode(path, size)
    except Exception as error:  # Pillow's formats raise anything, SyntaxError and struct.error too
        return " ".join(str(error).split()) or type(error).__name__


def _open(path: Path) -> Image.Image:
    """The image file.  A JPEG may be of any size here: `draft` shrinks it before it is decoded."""
    try:
        return JpegImagePlugin.JpegImageFile(path)
    except SyntaxError:  # another format
        return Image.open(path)


def _several_scans(image: Image.Image) -> bool:
    """Whether it is a JPEG that is progressive, or whose channels come one after the other."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return False
    length = 6 + 2 * image.layers  # of a scan's header; Pillow stops behind that of the first
    image.fp.seek(-length, os.SEEK_CUR)
    return "progressive" in image.info or int.from_bytes(image.fp.read(2), "big") != length


def _sixteen_bits(image: Image.Image) -> bool:
    """Whether a file that is not yet decoded has 16 bits a channel.

    ValueError where it has 32 bits or signs, and for 16-bit files that Pillow decodes wrongly.
    """
    stored, tags = str(getattr(image, "tile", "")), image.tag_v2 if image.format == "TIFF" else {}
    bits, sample_format, white_is_zero = tags.get(258, ()), tags.get(339, ()), tags.get(262) == 0
    # older releases of Pillow open 16-bit files of these two formats as 32-bit integers
    known = ";16" in stored or (image.format in ("PNG", "PPM") and image.mode == "I")
    signed = 2 in sample_format or (image.format == "FITS" and image.mode != "L")
    if signed or image.mode == "F" or (image.mode == "I" and not known):
        raise ValueError(
            "32-bit or signed pixels, whose range is unknown: save them with 8 or 16 bits"
        )
    if 16 in bits and (white_is_zero or not known):
        raise ValueError("16-bit TIFF of separate planes, or with white at 0: save it as PNG")
    return known


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1 where there is none or it can't be read."""
    try:
        turn = image.getexif().get(0x0112, 1)
    except Exception:  # damaged in any way: the pixels are good
        return 1
    return turn if isinstance(turn, int) and turn in UPRIGHT else 1
