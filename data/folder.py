"""A user's own images: DIR/train/CLASS/*, DIR/test/CLASS/*, DIR/unlabelled/**, or just images.

They are decoded once, to uint8 squares of --store-size in DIR/.byol-pack (or in ./datasets/packs
where that can't be written to), and again when a file comes, goes or changes.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin
from tqdm import tqdm

from data.datasets import DataConfig, Dataset, pack_folders, printable, writable
from data.images import Images
from training.config import UserError
from training.distributed import first_process
from training.locks import locked

FORMAT = 2  # of the packs
BLOCK = 256  # files in flight, which bounds the memory
SOFTWARE = "byol"  # in the PNG files that this project writes; they are no data
OURS = f"a picture made by {SOFTWARE}"
# TensorBoard's folders of pictures, result tables and Python's environments have these files.  What
# else is never data begins with a dot or is the work of an operating system, a NAS or an archiver.
OUTPUT = ({"sprite.png", "tensors.tsv"}, {"settings.json", "cells.jsonl"}, {"pyvenv.cfg"})
SYSTEM = {"@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot",
          "$recycle.bin", "system volume information", "lost.dir", "lost+found",
          "__macosx"}  # in small letters  # fmt: skip
T = Image.Transpose
UPRIGHT = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
           6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90}  # by EXIF's orientation  # fmt: skip


@contextlib.contextmanager
def _one_line():
    """UserError for what can't be read."""
    try:
        yield
    except OSError as error:
        text = printable(f"{error.filename}: {error.strerror}")
        raise UserError(f"{text}; make it readable or move it away") from None


@dataclass
class Listing:
    """The image files of a data set, relative to its root.

    files     split -> class -> files; classes are in order, images without one are in ""
    ignored   kind of file -> how many there are
    notes     warnings for the user
    state     digest of the names, sizes and times of all images
    """

    files: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    ignored: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    state: str = ""

    def __str__(self) -> str:
        """The files that are ignored, in words."""
        kinds = ", ".join(f"{n} {printable(kind)}" for kind, n in self.ignored.most_common(3))
        more = ", ..." if len(self.ignored) > 3 else ""
        return f"{self.ignored.total()} other files" + (f" ({kinds}{more})" if kinds else "")


class Decoded(NamedTuple):
    """(3, size, size) uint8, and the largest value of a 16-bit image in 0..1, else None."""

    pixels: np.ndarray
    peak: float | None


_prepared: dict[tuple[Path, int], Path] = {}  # (root, size) -> pack, of this process


def prepare(root: Path, data: DataConfig) -> None:
    """Pack the images unless an up-to-date pack exists; name those that cannot be read."""
    key = root.absolute(), data.store_size
    _prepared.pop(key, None)
    listing = list_images(root)
    if not (pack := _find(root, data.store_size, listing.state)):
        place, ours = pack_folders(root, ".byol-pack")
        place = place if writable(place / "lock") else ours
        with locked(place / "lock"):
            pack = _find(root, data.store_size, listing.state)
            pack = pack or _pack(root, listing, place, data.store_size)
    _prepared[key] = pack
    bad = [name for name in _manifest(pack)["skipped"] if name[1] != OURS]
    notes = listing.notes
    if bad:
        names = ", ".join(f"{name!r} ({reason})" for name, reason in bad[:3])
        more = ", ..." if len(bad) > 3 else ""
        text = f"{len(bad)} unreadable images in {printable(str(root))}: {names}{more}"
        if data.strict:
            raise UserError(f"--strict: {text}; replace or remove them")
        notes = [*notes, f"{text}: left out; --strict refuses them"]
    for text in notes if first_process() else ():
        print(f"warning: {text}", file=sys.stderr)


def load(root: Path, data: DataConfig) -> Dataset:
    """Map the pack of the images that are there now, made by `prepare`."""
    pack, images, labels = _current(root, data), {}, {}
    try:
        counts = _manifest(pack)["counts"]
        for split, by_class in counts.items():
            images[split] = Images([np.load(pack / f"{split}.npy", mmap_mode="r")])
            labels[split] = np.repeat(np.arange(len(by_class)), list(by_class.values()))
    except (OSError, ValueError) as error:
        raise UserError(f"--data-root {root}: no valid pack: {error}; delete {pack}") from None
    return Dataset(
        images.get("train"), labels.get("train"), images.get("unlabelled"), images.get("test"),
        labels.get("test"), [printable(name) for name in counts.get("train", {})],
    )  # fmt: skip


def file_names(root: Path, data: DataConfig, split: str) -> list[str]:
    """The files of a split, relative to `root`, in the order of its images."""
    return json.loads((_current(root, data) / "files.json").read_bytes())[split]


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
        deep = _sixteen_bits(image)
        image.load()
        image = image.transpose(UPRIGHT[turn]) if (turn := _orientation(image)) > 1 else image
        peak = None
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
    stored, tags = str(image.tile), image.tag_v2 if image.format == "TIFF" else {}
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


@_one_line()
def list_images(root: Path) -> Listing:
    """The images below `root` by split and class; UserError where nothing can be trained on."""
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; name the one that holds your images")
    found, folders = walk(root)
    # a link may lead to a disk that is not there now
    labelled = (root / "train").is_dir() or (root / "train").is_symlink()
    listing, known = Listing(), set(_images(found))
    for path in found:
        split, name = _place(path, labelled)
        if path in known and split:
            listing.files.setdefault(split, {}).setdefault(name, []).append(path)
        else:
            kind = os.path.splitext(path)[1].lower()[:20] or "without an ending"
            kind = kind if found[path] else "dead links"
            listing.ignored[kind + (" outside a class" if path in known else "")] += 1
    files = listing.files
    if not files or labelled and "train" not in files:
        raise UserError(f"--data-root {root}: no images, but {listing}; expected train/CLASS/*, "
                        "or images and no folder train/")  # fmt: skip
    train, test = files.get("train", {}), files.get("test", {})
    for unknown in test.keys() - train.keys():
        name = printable(f"{root}/test/{unknown}")
        raise UserError(f"{name}: train/ has no images of that class; rename or add it")
    if train:
        files["train"] = {name: train[name] for name in sorted(train)}
    if test:
        files["test"] = {name: test.get(name, []) for name in sorted(train)}
    places = {f: _place(f + "/x", labelled) for f in folders if f.count("/") == 1}
    if empty := [f for f, (split, c) in places.items() if c and not files.get(split, {}).get(c)]:
        listing.notes.append(f"no images in {_some(empty)}")
    if dead := [path for path, real in found.items() if not real and path not in known]:
        listing.notes.append(f"links that lead nowhere: {_some(dead)}")
    _inspect(root, listing, found)
    return listing


def _inspect(root: Path, listing: Listing, real: dict[str, str]) -> None:
    """Fill in the listing's state, and warn of images that links show twice.

    real   of each file its real path
    """
    digest, first, twice = hashlib.sha256(str(FORMAT).encode()), {}, []
    here = os.path.join(os.path.realpath(root), "")
    for path in (f for by_class in listing.files.values() for fs in by_class.values() for f in fs):
        status = os.stat(root / path, follow_symlinks=bool(real[path]))
        # files that were swapped may have equal times of their last change
        times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}"
        target = real[path].removeprefix(here)  # a link may be replaced by another
        digest.update(os.fsencode(f"{path}\0{target}\0{status.st_size}\0{times}\0"))
        hard_link = status.st_nlink > 1 and (status.st_dev, status.st_ino)
        key = hard_link or real[path] or path
        if first.setdefault(key, path) != path:
            twice.append(f"{first[key]} = {path}")
    listing.state = digest.hexdigest()
    if twice:
        listing.notes.append(f"{len(twice)} images are there twice, by links: {_some(twice)}")


def _some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")


def _place(path: str, labelled: bool) -> tuple[str, str]:
    """Split and class that a file belongs to; no split where it is in none."""
    split, *rest = path.split("/")
    if split == "unlabeled" or not labelled:
        split = "unlabelled"
    if split in ("train", "test") and len(rest) > 1:  # macOS and Linux compose letters differently
        return split, unicodedata.normalize("NFC", rest[0])
    return (split, "") if split == "unlabelled" else ("", "")


def image_files(root: Path) -> list[str]:
    """The image files below `root`, relative to it, sorted."""
    return _images(walk(root)[0])


def _images(files) -> list[str]:
    """Those whose ending is that of a format which Pillow reads."""
    known = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [path for path in files if os.path.splitext(path)[1].lower() in known]


@_one_line()
def walk(root: Path) -> tuple[dict[str, str], list[str]]:
    """(files, folders) below `root`, sorted, relative to it; each file with its real path.

    What is hidden, an operating system's or our own output is left out, and so are pipes and
    sockets.  Links are followed, but not to a folder that they are in; one that leads nowhere is a
    file whose real path is "".  UserError where two ways lead to one folder, or one can't be read.
    """
    files, folders, seen = {}, [], {}
    waiting = [("", os.path.realpath(root), [])]
    while waiting:
        where, real, above = waiting.pop()
        if real in above:
            continue  # its images are there already
        folder = os.path.join(root, where)
        if real in seen:
            names = printable(f"{folder} and {seen[real]}")
            raise UserError(f"{names} are one folder, by a link; remove one")
        seen[real] = folder
        folders.append(where)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        if where and any(marks <= {entry.name for entry in entries} for marks in OUTPUT):
            continue
        for entry in entries:
            if entry.name[0] == "." or entry.name.lower() in SYSTEM:
                continue
            path = f"{where}/{entry.name}" if where else entry.name
            if _is_folder(entry):
                waiting.append((path, os.path.realpath(entry), [*above, real]))
            elif entry.is_symlink():
                files[path] = os.path.realpath(entry) if os.path.exists(entry) else ""
            elif entry.is_file():
                files[path] = os.path.join(real, entry.name)
    return dict(sorted(files.items())), sorted(folders)


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder, or a link to one; a link that leads nowhere is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return False
        raise


def _find(root: Path, size: int, state: str) -> Path | None:
    """The pack of images in that state, whole and readable."""
    for place in pack_folders(root, ".byol-pack"):
        for name in glob.glob(f"{size}-{state[:16]}*", root_dir=place):
            if _whole(place / name, root, size, state):
                return place / name
    return None


def _whole(pack: Path, root: Path, size: int, state: str) -> bool:
    """Whether it is complete, readable, and of the images in that state.

    It is not complete where an image can be read now that another user couldn't read, or that was
    out of reach for a while: neither changes the file.
    """
    try:
        manifest = _manifest(pack)
        files = [(pack / name, length) for name, length in manifest["bytes"].items()]
        readable = all(f.stat().st_size == n and os.access(f, os.R_OK) for f, n in files)
        refused = [root / name for name, why in manifest["skipped"] if why.startswith("[Errno")]
        return (
            readable
            and manifest["state"] == state
            and all(isinstance(again, str) for again in decode_all(refused, size))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _manifest(pack: Path) -> dict:
    return json.loads((pack / "manifest.json").read_bytes())


def _current(root: Path, data: DataConfig) -> Path:
    """The pack that this process has prepared, or else the one of the images as they are now."""
    if pack := _prepared.get((root.absolute(), data.store_size)):
        return pack
    if pack := _find(root, data.store_size, list_images(root).state):
        return pack
    raise UserError(f"--data-root {root}: has no pack, or has changed since; start again")


def _pack(root: Path, listing: Listing, place: Path, size: int) -> Path:
    """Write a pack into the folder `place`, whole or not at all; older ones of that size go.

    Its name is new: what is there may belong to somebody else, who alone can remove it.
    """
    new = secrets.token_hex(4)
    pack, partial = place / f"{size}-{listing.state[:16]}-{new}", place / f"{size}.{new}.partial"
    manifest = {"state": listing.state, "counts": {}, "bytes": {}, "skipped": []}
    names, faint = {}, []
    try:
        partial.mkdir()
        for split, by_class in listing.files.items():
            path = partial / f"{split}.npy"
            counts, names[split] = _write(path, root, by_class, size, manifest["skipped"], faint)
            manifest["counts"][split] = counts
            gone = [name for name in by_class if by_class[name] and not counts[name]]
            if gone and (split != "test" or not any(counts.values())):
                file, reason = next(s for s in manifest["skipped"] if s[0] in by_class[gone[0]])
                text = f"no image there can be read, as {file!r}: {reason}"
                raise UserError(f"{printable(str(root / split / gone[0]))}: {text}")
        (partial / "files.json").write_text(json.dumps(names), encoding="ascii")
        manifest["bytes"] = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(manifest), encoding="ascii")
        os.rename(partial, pack)
    except OSError as error:
        raise UserError(f"--data-root: cannot write {pack}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in place.glob(f"{size}*"):
        if old != pack and re.match(r"\d+", old.name)[0] == str(size):
            shutil.rmtree(old, ignore_errors=True)
    print(printable(f"packed {root} at {size} px in {pack}; {listing} ignored"))
    if faint:
        print(
            f"warning: 16-bit images in {_some(faint)} use less than a sixteenth of the range and "
            "come out nearly black (a 12-bit camera?): spread their values first",
            file=sys.stderr,
        )
    return pack


def _write(
    path: Path, root: Path, by_class: dict, size: int, skipped: list, faint: list
) -> tuple[dict[str, int], list[str]]:
    """Stream a split to a .npy file; how many images each class has, and the files' names.

    Written rather than memory-mapped, so that a full disk is an error and not a SIGBUS.
    """
    counts, names = dict.fromkeys(by_class, 0), []
    with (
        open(path, "wb") as file,
        tqdm(total=sum(map(len, by_class.values())), desc=f"packing {path.stem}", unit=" images",
             disable=None) as bar,
    ):  # fmt: skip
        _header(file, 0, size)
        for name, files in by_class.items():
            peaks = []
            decoded = decode_all([root / f for f in files], size)
            for file_name, image in zip(files, decoded, strict=True):
                if isinstance(image, str):
                    skipped.append([file_name, image])
                else:
                    file.write(image.pixels)
                    peaks.append(image.peak)
                    names.append(file_name)
                bar.update()
            counts[name] = len(peaks)
            if deep := [peak for peak in peaks if peak is not None]:
                faint += [f"{path.stem}/{name}".rstrip("/")] if max(deep) < 1 / 16 else []
        _header(file, len(names), size)
    return counts, names


def _header(file, count: int, size: int) -> None:
    """numpy leaves room for the first number to grow, so each header has the same length."""
    file.seek(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, header)
