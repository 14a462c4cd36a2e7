import io
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import CONFIG, SIZE, flat, packed, picture, pixels, read_only, reds, save
from PIL import Image
from torchvision.transforms.v2 import functional as F

from core.errors import UserError
from data import decode, folder


def test_splits_classes_and_order(root):
    data = packed(root)
    assert data.class_names == ["ant", "cat", "dog"]
    assert reds(data.train) == [12, 11, 10, 13] and data.train_labels.tolist() == [0, 1, 1, 2]
    assert reds(data.test) == [61, 60] and data.test_labels.tolist() == [0, 2]
    assert reds(data.unlabelled) == [90, 91]
    assert data.train_labels.dtype == np.int64
    assert data.train.shape == (SIZE, SIZE) and isinstance(data.train.parts[0], np.memmap)


def test_sorted_by_class_where_the_names_of_files_sort_otherwise(tmp_path):
    for n, name in enumerate(["a b/1.png", "a/1.png", "a.b/1.png", "a/0/1.png"]):
        flat(tmp_path / "train" / name, (n, 0, 0))
    data = packed(tmp_path)
    assert data.class_names == ["a", "a b", "a.b"]
    assert reds(data.train) == [3, 1, 0, 2] and data.train_labels.tolist() == [0, 0, 1, 2]


def test_train_alone(tmp_path):
    flat(tmp_path / "train" / "a" / "1.png", (5, 0, 0))
    data = packed(tmp_path)
    assert data.test is None and data.test_labels is None and data.unlabelled is None


def test_images_without_classes(tmp_path):
    flat(tmp_path / "1.png", (5, 0, 0))
    flat(tmp_path / "some" / "where" / "2.png", (6, 0, 0))
    data = packed(tmp_path)
    assert reds(data.unlabelled) == [5, 6] and data.class_names == []
    assert data.train is None and data.train_labels is None and data.test is None
    assert len(data.pretraining("train+unlabelled")[0]) == 2


def test_more_images_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "BLOCK", 3)
    for n in range(10):
        flat(tmp_path / "train" / "ab"[n % 2] / f"{n}.png", (n, 0, 0))
    (tmp_path / "train" / "a" / "4.png").write_bytes(b"")
    data = packed(tmp_path)
    assert reds(data.train) == [0, 2, 6, 8, 1, 3, 5, 7, 9]
    assert data.train_labels.tolist() == [0] * 4 + [1] * 5


SHAPES = [(48, 32), (32, 48), (16, 16), (16, 50), (8, 12), (448, 256)]


@pytest.mark.parametrize("shape", SHAPES)
def test_resize_short_side_then_centre_crop(tmp_path, shape):
    image = picture(*shape)
    save(tmp_path / "a.png", image)
    got = torch.from_numpy(pixels(tmp_path / "a.png", SIZE)).float()
    wide, high = (side * SIZE // min(shape) for side in shape)
    x = F.resize(F.pil_to_tensor(image).float(), [high, wide], F.InterpolationMode.BICUBIC,
                 antialias=True)  # fmt: skip
    expected = F.center_crop(x, [SIZE, SIZE]).clamp(0, 255)
    assert (got - expected).abs().max() <= 1.5  # two roundings to 8 bits


def test_large_jpeg_is_close_to_its_full_decoding(tmp_path):
    rng = np.random.default_rng(0)  # detail of about one pixel of the result
    image = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    save(tmp_path / "a.jpg", image.resize((240, 180), Image.Resampling.BICUBIC), quality=95)
    save(tmp_path / "a.png", Image.open(tmp_path / "a.jpg"))
    jpeg, png = (pixels(tmp_path / f"a.{e}", 32).astype(int) for e in ("jpg", "png"))
    assert np.abs(jpeg - png).mean() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions that undo it
    upright = picture(32, 32)
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.png", stored, exif=exif)
    expected = np.asarray(upright.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    got = pixels(tmp_path / "a.png", SIZE).transpose(1, 2, 0)
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_modes_of_pillow_become_rgb(tmp_path):
    colours = {"RGB": (200, 100, 50), "CMYK": (55, 155, 205, 0), "L": 120, "1": 1, "LA": (80, 255)}
    expected = {"RGB": (200, 100, 50), "CMYK": (200, 100, 50), "L": (120,) * 3, "1": (255,) * 3,
                "LA": (80,) * 3}  # fmt: skip
    for mode, colour in colours.items():
        kind = "tif" if mode == "CMYK" else "png"
        flat(tmp_path / f"{mode}.{kind}", colour, mode)
        got = pixels(tmp_path / f"{mode}.{kind}", SIZE)
        assert got.shape == (3, SIZE, SIZE) and got.dtype == np.uint8
        assert got[:, 5, 5].tolist() == pytest.approx(expected[mode], abs=1), mode


def test_cmyk_jpeg(tmp_path):
    flat(tmp_path / "a.jpg", (55, 155, 205, 0), "CMYK", size=(64, 64))
    got = pixels(tmp_path / "a.jpg", SIZE)[:, 5, 5]
    assert got.tolist() == pytest.approx([200, 100, 50], abs=6)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = (np.arange(32)[None, :] * 2048 + np.zeros((32, 1))).astype(np.uint16)
    save(tmp_path / "a.png", Image.fromarray(ramp))
    got = pixels(tmp_path / "a.png", 32)[:, 7].astype(int)
    assert (got == got[0]).all()
    assert np.abs(got[0] - np.arange(32) * 2048 / 257).max() <= 1


def test_transparency_is_laid_on_white(tmp_path):
    half = np.zeros((20, 20, 4), np.uint8)
    half[:, :10] = (200, 10, 10, 255)
    save(tmp_path / "a.png", Image.fromarray(half))
    got = pixels(tmp_path / "a.png", 20)
    assert got[:, 5, 2].tolist() == [200, 10, 10] and got[:, 5, 17].tolist() == [255] * 3
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    save(tmp_path / "b.png", palette)
    save(tmp_path / "c.gif", palette, transparency=1)
    assert pixels(tmp_path / "b.png", SIZE)[:, 3, 3].tolist() == [10, 200, 30]
    assert pixels(tmp_path / "c.gif", SIZE)[:, 3, 3].tolist() == [255] * 3


def test_extreme_shapes_need_no_memory(tmp_path):
    flat(tmp_path / "dot.png", (9, 8, 7), size=(1, 1))
    flat(tmp_path / "line.png", (6, 5, 4), size=(20_000, 1))
    assert pixels(tmp_path / "dot.png", SIZE)[:, 0, 0].tolist() == [9, 8, 7]
    assert pixels(tmp_path / "line.png", SIZE)[:, 0, 0].tolist() == [6, 5, 4]


def bomb(side=20_000):
    """A PNG with side x side pixels in its header and none behind it."""

    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))  # fmt: skip

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


def bad_files():
    buffer = io.BytesIO()
    picture(200, 200).save(buffer, "JPEG")
    return {"truncated.jpg": buffer.getvalue()[:2000], "empty.jpg": b"", "text.jpg": b"hello\n",
            "bomb.png": bomb(), "header.png": b"\x89PNG\r\n\x1a\n"}  # fmt: skip


@pytest.mark.parametrize("name", bad_files())
def test_D7_unreadable_images_are_left_out_and_named(root, capsys, name):
    (root / "train" / "cat" / name).write_bytes(bad_files()[name])
    for _ in range(2):  # when they are packed, and at each later start
        data = packed(root)
        assert reds(data.train) == [12, 11, 10, 13] and data.train_labels.tolist() == [0, 1, 1, 2]
        warning = capsys.readouterr().err.strip()
        assert warning.count("\n") == 0 and warning.startswith("warning: 1 unreadable")
        assert f"train/cat/{name}" in warning and "--strict" in warning
    with pytest.raises(UserError, match=f"--strict: 1 unreadable.*train/cat/{name}"):
        packed(root, strict=True)


def test_strict_refuses_at_once_and_accepts_the_repaired_folder(root):
    (root / "unlabelled" / "z.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="unlabelled/z.jpg"):
        packed(root, strict=True)
    flat(root / "unlabelled" / "z.jpg", (92, 0, 0))
    assert len(packed(root, strict=True).unlabelled) == 3


def test_many_unreadable_images_are_counted_in_one_line(root, capsys):
    for n in range(5):
        (root / "unlabelled" / f"x{n}.png").write_bytes(b"")
    (root / "unlabelled" / "x0\n.png").write_bytes(b"")
    packed(root)
    warning = capsys.readouterr().err.strip()
    assert "6 unreadable" in warning and "x1.png" in warning and "x2" not in warning
    assert warning.count("\n") == 0


def test_a_class_that_cannot_be_read_is_an_error_and_leaves_nothing(root):
    (root / "train" / "dog" / "c.PNG").write_bytes(b"")
    text = "no image of class dog in train can be decoded, for example train/dog/c.PNG"
    with pytest.raises(UserError, match=text):
        packed(root)
    assert [p.name for p in (root / ".byol-pack").iterdir()] == ["lock"]


def test_other_files_are_ignored_but_counted(root, capsys):
    for name in ("train/cat/notes.txt", "readme.md", "train/loose.png", "val/x/1.png"):
        flat(root / "x.png", 0)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "x.png").rename(root / name)
    flat(root / "train" / ".hidden" / "a.png", 0)
    assert len(packed(root).train) == 4
    assert "ignored: 2 .png outside a class, 1 .md, 1 .txt\n" in capsys.readouterr().out


def test_a_class_only_in_test_is_an_error(root):
    flat(root / "test" / "bee" / "1.png", 0)
    with pytest.raises(UserError, match="test/bee.*train/"):
        packed(root)


def test_folders_without_images(tmp_path):
    for make, word in (("gone", "no such folder"), ("empty", "no images"), ("none/train", "CLASS")):
        if make != "gone":
            (tmp_path / make).mkdir(parents=True)
        with pytest.raises(UserError, match=word):
            packed(tmp_path / make.split("/")[0])
    flat(tmp_path / "loose" / "train" / "1.png", 0)
    flat(tmp_path / "loose" / "unlabelled" / "1.png", 0)
    with pytest.raises(UserError, match="train/CLASS"):
        packed(tmp_path / "loose")


def test_links_are_followed(root):
    outside = root.parent / "outside"
    flat(outside / "1.png", (77, 0, 0))
    os.symlink(outside, root / "train" / "eel")
    os.symlink(outside / "1.png", root / "unlabelled" / "z.png")
    data = packed(root)
    assert data.class_names == ["ant", "cat", "dog", "eel"]
    assert reds(data.train) == [12, 11, 10, 13, 77] and reds(data.unlabelled) == [90, 91, 77]


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that are decoded."""
    names, real = [], decode.decode
    monkeypatch.setattr(decode, "decode", lambda p, s: (names.append(p.name), real(p, s))[1])
    return names


def test_packed_once_and_again_when_the_folder_changes(root, decoded):
    packed(root)
    assert len(decoded) == 8
    packed(root)
    assert len(decoded) == 8
    flat(root / "train" / "cat" / "new.png", (50, 0, 0))
    assert reds(packed(root).train) == [12, 11, 10, 50, 13]
    (root / "train" / "cat" / "new.png").unlink()
    assert len(packed(root).train) == 4
    os.rename(root / "train" / "cat" / "a.png", root / "train" / "dog" / "a.png")
    assert packed(root).train_labels.tolist() == [0, 1, 2, 2]


def test_a_replaced_image_of_equal_size_is_packed_again(root):
    packed(root)
    path = root / "train" / "cat" / "a.png"
    flat(path, (55, 0, 0))
    os.utime(path, ns=(1, 1))
    assert reds(packed(root).train) == [12, 55, 10, 13]


def test_each_store_size_has_its_own_pack(root, decoded):
    assert packed(root, store_size=16).train.shape == (16, 16)
    assert packed(root, store_size=24).train.shape == (24, 24)
    assert packed(root, store_size=16).train.shape == (16, 16)
    assert len(decoded) == 16


def test_an_interrupted_pack_is_started_afresh(root, monkeypatch):
    partial = root / ".byol-pack" / f"{SIZE}-0123.partial"
    partial.mkdir(parents=True)
    (partial / "train.bin").write_bytes(b"half")
    assert len(packed(root).train) == 4 and not partial.exists()
    flat(root / "train" / "cat" / "new.png", (50, 0, 0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            packed(root)
    assert [p.name for p in (root / ".byol-pack").glob("*.partial")] == []
    assert len(packed(root).train) == 5


@pytest.mark.parametrize("name, content", [
    ("train.bin", b"short"), ("manifest.json", b"{"), ("test.bin", b"long" * 9999)
])  # fmt: skip
def test_a_damaged_pack_is_made_again(root, name, content):
    before = reds(packed(root).train)
    (pack,) = (root / ".byol-pack").glob(f"{SIZE}-*")
    (pack / name).write_bytes(content)
    data = packed(root)
    assert reds(data.train) == before and data.files["test"] == ["test/ant/e.png", "test/dog/d.png"]


def test_a_full_disk_is_one_line(root, monkeypatch):
    def full(*args, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        packed(root)
    assert [p.name for p in (root / ".byol-pack").iterdir()] == ["lock"]


def test_read_only_folders_are_packed_beside_us(root, tmp_path, monkeypatch):
    with read_only(monkeypatch, root):
        assert len(packed(root).train) == 4
    assert not (root / ".byol-pack").exists()
    assert len(list((tmp_path / "datasets" / "packs").glob("images-*"))) == 1
    assert len(packed(root).train) == 4 and not (root / ".byol-pack").exists()


def test_of_two_processes_only_one_packs(root, decoded):
    threads = [threading.Thread(target=folder.prepare, args=(root, CONFIG)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(decoded) == 8
