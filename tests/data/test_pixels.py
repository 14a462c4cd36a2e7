"""Pixels as files hold them: their range, their orientation, how many there are."""

import shutil
import struct
import tempfile
import zlib

import numpy as np
import pytest
from folders import SIZE, packed, picture, pixels, reds, save
from PIL import Image

from core.errors import UserError, warn_once
from data import decode
from data.datasets import DataConfig
from data.transform import EvalTransform


def told(capsys) -> str:
    """What was printed as a warning, one line each."""
    return capsys.readouterr().err


# Pixels: integers and floats


def ramp(low, high, dtype):
    """64 x 64 gray values from low at the left to high at the right."""
    return np.broadcast_to(np.linspace(low, high, 64), (64, 64)).astype(dtype)


REFUSED = {
    "float in 0..1": ("tif", ramp(0, 1, np.float32)),
    "float in 0..255": ("tif", ramp(0, 255, np.float32)),
    "int32 in 0..255": ("tif", ramp(0, 255, np.int32)),
    "int32 in 0..65535": ("tif", ramp(0, 65535, np.int32)),
}
if ".pfm" in Image.registered_extensions():  # not in older releases of Pillow
    REFUSED["pfm"] = ("pfm", ramp(0, 1, np.float32))


@pytest.mark.parametrize("ending, values", REFUSED.values(), ids=REFUSED)
def test_pixels_whose_range_is_unknown_are_refused_by_name(root, capsys, ending, values):
    save(root / "train" / "cat" / f"odd.{ending}", Image.fromarray(values))
    assert reds(packed(root).train) == [12, 11, 10, 13]
    assert f"train/cat/odd.{ending} (32-bit or signed pixels" in told(capsys)


def test_a_class_of_such_pixels_is_one_line_that_names_one_of_its_files(tmp_path):
    for name in ("ant", "bee"):
        save(tmp_path / "train" / name / f"{name}.tif", Image.fromarray(ramp(0, 1, np.float32)))
    with pytest.raises(UserError, match=r"class ant in train .*train/ant/ant.tif: 32-bit"):
        packed(tmp_path)


def tiff(path, values, order="<", **changes):
    """An uncompressed TIFF, written by hand: Pillow writes neither signs nor big-endian.

    values    gray (H, W); further channels stand above one another: (3, H, W), one plane each
    changes   tags as t339=2
    """
    signed, bits, planes = values.dtype.kind == "i", 8 * values.itemsize, values.shape[:-2]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape[-2:]
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height,
            279: len(data), 339: 2 if signed else 1}  # fmt: skip
    lists = {}
    if planes:  # of each, where its bits, offset and length are written
        offsets = [8 + n * len(data) // 3 for n in range(3)]
        lists = {258: [bits] * 3, 273: offsets, 279: [len(data) // 3] * 3}
        tags |= {262: 2, 277: 3, 284: 2}
    tags |= {int(name[1:]): value for name, value in changes.items()}
    start = 8 + len(data)
    for tag, numbers in lists.items():
        tags[tag] = start
        data += struct.pack(f"{order}3I", *numbers)
        start += 12
    entries = b"".join(
        struct.pack(f"{order}HHII", tag, 4, len(lists.get(tag, [0])), value)
        for tag, value in sorted(tags.items())
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    path.write_bytes(head + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("order", "<>")
def test_sixteen_bit_tiffs_keep_their_values_and_signed_ones_are_refused(tmp_path, order):
    values = ramp(0, 65535, np.uint16)
    tiff(tmp_path / "a.tif", values, order=order)
    got = pixels(tmp_path / "a.tif", 64)[0, 30].astype(int)
    assert np.abs(got - values[0] / 257).max() <= 1
    tiff(tmp_path / "b.tif", (values // 2).astype(np.int16), order=order)
    with pytest.raises(ValueError, match="signed"):
        pixels(tmp_path / "b.tif", 64)


def test_planes_of_a_tiff(tmp_path):
    planes = np.stack([ramp(0, 255, np.uint8), ramp(255, 0, np.uint8), ramp(9, 9, np.uint8)])
    tiff(tmp_path / "a.tif", planes)
    assert np.array_equal(pixels(tmp_path / "a.tif", 64), planes)


def fits(path, values, bits):
    """As astronomers write unsigned values: signed ones and an offset."""
    cards = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": 64, "NAXIS2": 64, "BZERO": 32768}
    text = "".join(f"{key:8}= {value:>20}".ljust(80) for key, value in cards.items()) + "END"
    path.write_bytes(text.ljust(2880).encode() + values.tobytes() + bytes(2880))


WRONGLY_DECODED = {  # by Pillow, without a word
    "signed bytes": lambda p: tiff(p, ramp(-128, 127, np.int8)),
    "16 bits and white at 0": lambda p: tiff(p, ramp(0, 65535, np.uint16), t262=0),
    "16 bits in planes": lambda p: tiff(p, np.stack([ramp(0, 65535, np.uint16)] * 3)),
    "fits": lambda p: fits(p, ramp(-32768, 32767, ">i2"), 16),
}


@pytest.mark.parametrize("write", WRONGLY_DECODED.values(), ids=WRONGLY_DECODED)
def test_what_pillow_decodes_wrongly_is_refused(tmp_path, write):
    write(tmp_path / "a.tif")  # by its content
    with pytest.raises(ValueError, match="signed pixels|16-bit TIFF"):
        pixels(tmp_path / "a.tif", 64)


@pytest.mark.parametrize("most", [65535, 4095, 255])
def test_portable_gray_maps_say_their_range(tmp_path, most):
    values = ramp(0, most, ">u2" if most > 255 else "u1")
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 %d\n" % most + values.tobytes())
    got = pixels(tmp_path / "a.pgm", 64)[0, 30].astype(int)
    assert np.abs(got - np.linspace(0, 255, 64)).max() <= 1.5


def png(path, values, before=(), after=()):
    """A PNG of values that Pillow does not write: (H, W, 3) or (H, W), 8 or 16 bits.

    before, after   chunks (kind, data) on both sides of the pixels
    """

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    lines = b"".join(b"\0" + row.astype(f">u{values.itemsize}").tobytes() for row in values)
    kind = 2 if values.ndim == 3 else 0
    height, width = values.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 8 * values.itemsize, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), *before, (b"IDAT", zlib.compress(lines)), *after, (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks))


def deep(path, most, colour=False):
    """A 16-bit PNG whose largest value is `most`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = ramp(0, most, np.uint16)
    if colour:
        png(path, np.stack([values] * 3, 2))
    else:
        Image.fromarray(values).save(path)


def test_the_transparent_value_of_sixteen_bit_gray_is_white(tmp_path):
    values = np.full((4, 8), 3000, np.uint16)
    values[:, 4:] = 32896
    png(tmp_path / "a.png", values[:, :4].repeat(2, 0).repeat(2, 1), [(b"tRNS", b"\x0b\xb8")])
    assert (pixels(tmp_path / "a.png", 8) == 255).all()
    png(tmp_path / "b.png", values.repeat(2, 0), [(b"tRNS", b"\x0b\xb8")])
    assert pixels(tmp_path / "b.png", 8)[0, 0].tolist() == [255] * 4 + [128] * 4


@pytest.mark.parametrize("ending", ["gif", "png"])
def test_a_palette_with_a_transparent_index(tmp_path, ending):
    image = picture(32, 32).quantize(8)
    index = int(np.asarray(image)[3, 3])
    image.save(tmp_path / f"a.{ending}", transparency=index)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == index] = 255
    assert np.array_equal(pixels(tmp_path / f"a.{ending}", 32).transpose(1, 2, 0), expected)


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_the_first_of_several_frames(tmp_path, ending):
    first, more = picture(32, 32), {"lossless": True} if ending == "webp" else {}
    red = Image.new("RGB", (32, 32), "red")
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=[red], **more)
    assert np.array_equal(pixels(tmp_path / f"a.{ending}", 32).transpose(1, 2, 0), first)


@pytest.mark.parametrize("colour", [False, True])
def test_twelve_bits_in_sixteen_are_warned_of(tmp_path, capsys, colour):
    for n in range(3):
        deep(tmp_path / "train" / "faint" / f"{n}.png", 4095, colour)
        deep(tmp_path / "unlabelled" / f"{n}.png", 65535 if n == 2 else 4095, colour)
    packed(tmp_path)
    text = told(capsys)
    assert "train: all images are nearly black" in text and text.count("\n") == 1
    packed(tmp_path)
    assert told(capsys) == ""  # at packing


# Pixels: EXIF


def with_exif(image, entries, order="<") -> bytes:
    """A JPEG whose EXIF holds exactly these entries: (tag, type, count, four bytes)."""
    with tempfile.TemporaryFile() as file:
        image.save(file, "JPEG", quality=95)
        file.seek(0)
        jpeg = file.read()
    data = b"".join(
        struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries
    )
    payload = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + data + bytes(4)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + jpeg[2:]


TURNED = (0x112, 3, 1, struct.pack("<HH", 6, 0))
ODD = {
    "a negative short": [TURNED, (0x103, 9, 1, struct.pack("<i", -5))],
    "text for a number": [TURNED, (0x100, 2, 4, b"abc\0")],
    "an offset behind the end": [TURNED, (0x10F, 2, 900, struct.pack("<I", 60000))],
    "an unknown type": [TURNED, (0x110, 99, 1, bytes(4))],
    "a sub-folder that is none": [TURNED, (0x8769, 4, 1, struct.pack("<I", 50000))],
}


@pytest.mark.parametrize("entries", ODD.values(), ids=ODD)
def test_photographs_are_turned_whatever_else_their_exif_holds(tmp_path, entries):
    upright = picture(32, 32)
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    (tmp_path / "a.jpg").write_bytes(with_exif(stored, entries))
    expected = np.asarray(upright.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(pixels(tmp_path / "a.jpg", SIZE).transpose(1, 2, 0) - expected).mean() < 4


UPRIGHT = {
    "orientation 9": [(0x112, 3, 1, struct.pack("<HH", 9, 0))],
    "orientation in words": [(0x112, 2, 4, b"top\0")],
    "no entry": [],
}


@pytest.mark.parametrize("entries", UPRIGHT.values(), ids=UPRIGHT)
def test_an_orientation_that_means_nothing_loses_no_photograph(tmp_path, entries):
    (tmp_path / "a.jpg").write_bytes(with_exif(picture(32, 32), entries))
    expected = np.asarray(picture(32, 32).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    got = pixels(tmp_path / "a.jpg", SIZE).transpose(1, 2, 0).astype(int)
    assert np.abs(got - expected).mean() < 4


def test_exif_that_is_noise_loses_no_photograph(tmp_path):
    picture(32, 32).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + bytes(range(200)))
    assert pixels(tmp_path / "a.jpg", SIZE).shape == (3, SIZE, SIZE)


SIDEWAYS = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + bytes(4)


@pytest.mark.parametrize("exif, turned", [(SIDEWAYS, True), (b"garbage!", False)])
@pytest.mark.parametrize("late", [False, True])
def test_exif_of_a_png_on_either_side_of_its_pixels(tmp_path, exif, turned, late):
    upright = np.asarray(picture(32, 32))
    chunks = {"after" if late else "before": [(b"eXIf", exif)]}
    png(tmp_path / "a.png", np.rot90(upright) if turned else upright, **chunks)
    assert np.array_equal(pixels(tmp_path / "a.png", 32).transpose(1, 2, 0), upright)


def test_a_tiff_whose_exif_lies_behind_its_end(tmp_path):
    tiff(tmp_path / "a.tif", ramp(0, 255, np.uint8), t34665=999_999)
    assert np.array_equal(pixels(tmp_path / "a.tif", 64)[0], ramp(0, 255, np.uint8))


@pytest.mark.parametrize("ending", ["tif", "webp", "png"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_orientation_in_other_formats(tmp_path, ending, orientation):
    upright, exif = picture(32, 32), Image.Exif()
    turn = Image.Transpose.ROTATE_180 if orientation == 3 else Image.Transpose.ROTATE_90
    exif[0x112] = orientation
    upright.transpose(turn).save(tmp_path / f"a.{ending}", exif=exif)
    expected = np.asarray(upright.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
    got = pixels(tmp_path / f"a.{ending}", SIZE).transpose(1, 2, 0)
    assert np.abs(got - expected).mean() < 4


# Pixels: how many


def test_a_jpeg_of_ninety_megapixels_is_packed(tmp_path):
    Image.new("L", (10_000, 9_000), 77).save(tmp_path / "a.jpg")
    assert pixels(tmp_path / "a.jpg", SIZE)[:, 3, 3].tolist() == [77] * 3


@pytest.mark.parametrize("ending", ["ico", "icns", "gif"])
def test_bombs_inside_other_formats(tmp_path, ending):
    """The outer header is of a small image."""
    png(tmp_path / "x.png", np.zeros((1, 1), np.uint8))
    inner = bytearray((tmp_path / "x.png").read_bytes())
    inner[16:24] = struct.pack(">II", 60_000, 60_000)
    inner[29:33] = struct.pack(">I", zlib.crc32(inner[12:29]))
    size, frame = len(inner), struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0)
    content = {
        "ico": struct.pack("<HHHIHHII", 0, 1, 1, 0, 1, 32, size, 22) + inner,
        "icns": struct.pack(">4sI4sI", b"icns", size + 16, b"ic09", size + 8) + inner,
        "gif": b"GIF89a\1\0\1\0\x80\0\0" + bytes(6) + b"," + frame + b"\2\2\x44\1\0;",
    }
    (tmp_path / f"a.{ending}").write_bytes(content[ending])
    (error,) = decode.decode_all([tmp_path / f"a.{ending}"], SIZE)
    assert "3600000000 pixels" in error


def test_crops_larger_than_the_stored_images_are_warned_of_once(capsys):
    warn_once.cache_clear()
    for _ in range(2):
        EvalTransform.of(DataConfig(crop_size=224), (160, 160), [0.5] * 3, [0.2] * 3)
    assert told(capsys).count("images of 160 pixels are enlarged to 224: lower --crop-size") == 1
    EvalTransform.of(DataConfig(crop_size=128), (160, 160), [0.5] * 3, [0.2] * 3)
    assert told(capsys) == ""


def test_endings_of_ignored_files_are_counted(root, capsys):
    for n in range(5):
        (root / "train" / "cat" / f"{n}.HEIC").write_bytes(b"x")
    for name in ("readme", "val/x/1.png", "val/x/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    packed(root)
    line = capsys.readouterr().out
    assert "ignored: 5 .heic, 2 .png outside a class, 1 without an ending\n" in line
    shutil.rmtree(root / "train")
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "1.heic").write_bytes(b"x")
    with pytest.raises(UserError, match="no images .*1 .heic"):
        packed(root)
