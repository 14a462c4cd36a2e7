"""A user's own images: DIR/train/CLASS/*, DIR/test/CLASS/*, DIR/unlabelled/**, or just images.

They are decoded once, to uint8 squares of --store-size in DIR/.byol-pack (or in ./datasets/packs
where DIR is read-only), and again when a file comes, goes or changes.
"""

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from data.datasets import DataConfig, Dataset
from data.images import Images
from data.locking import locked
from training.config import UserError

FORMAT = 1  # of the packs
BLOCK = 256  # files in flight, which bounds the memory
Listing = dict[str, dict[str, list[str]]]  # split -> class -> files relative to the root


def prepare(root: Path, data: DataConfig) -> None:
    """Pack the images unless an up-to-date pack exists; name those that cannot be read."""
    listing, ignored = _list(root)
    packs, state = _packs(root, data.store_size), _state(root, listing)
    if not (manifest := _current(packs, state)):
        pack = packs[0] if os.access(root, os.W_OK) else packs[1]
        with locked(pack.parent / "lock"):
            if not (manifest := _current(packs, state)):
                manifest = dict(state=state, ignored=ignored, counts={}, skipped=[])
                _pack(root, listing, pack, manifest, data.store_size)
    if bad := manifest["skipped"]:
        names = ", ".join(f"{name!r} ({reason})" for name, reason in bad[:3])
        text = f"{len(bad)} unreadable images in {root}: {names}{', ...' if len(bad) > 3 else ''}"
        if data.strict:
            raise UserError(f"--strict: {text}; replace or remove them")
        print(f"warning: {text}: left out; --strict refuses them", file=sys.stderr)


def load(root: Path, data: DataConfig) -> Dataset:
    """Map the newest pack of this --store-size, made by `prepare`."""
    found = [p / "manifest.json" for p in _packs(root, data.store_size)]
    found = sorted((p for p in found if p.is_file()), key=lambda p: p.stat().st_mtime)
    images, labels = {}, {}
    try:
        counts = json.loads(found[-1].read_text())["counts"]
        for split, by_class in counts.items():
            pack = np.load(found[-1].parent / f"{split}.npy", mmap_mode="r")
            images[split] = Images([pack])
            labels[split] = np.repeat(np.arange(len(by_class)), list(by_class.values()))
    except (OSError, ValueError, IndexError) as error:
        folder = _packs(root, data.store_size)[0]
        raise UserError(f"--data-root {root}: no valid pack: {error}; delete {folder}") from None
    return Dataset(
        images.get("train"), labels.get("train"), images.get("unlabelled"),
        images.get("test"), labels.get("test"), list(counts.get("train", {})),
    )  # fmt: skip


def decode(path: Path, size: int) -> np.ndarray:
    """The image upright, RGB on white, short side `size`, centre square: (3, size, size) uint8."""
    with Image.open(path) as image:
        image.draft(image.mode, (2 * size, 2 * size))  # JPEG: decode at 1/2, 1/4 or 1/8 if enough
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def decode_all(paths: list[Path], size: int) -> Iterator[np.ndarray | str]:
    """The images in order, or why one cannot be read; BLOCK of them are in flight."""
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for first in range(0, len(paths), BLOCK):
            yield from pool.map(lambda path: _try(path, size), paths[first : first + BLOCK])


def _packs(root: Path, size: int) -> tuple[Path, Path]:
    """Where the pack may lie: with the images, or where their folder is read-only, in ours."""
    real = root.resolve()
    name = f"{real.name}-{hashlib.sha256(os.fsencode(real)).hexdigest()[:12]}"
    return root / ".byol-pack" / str(size), Path("datasets", "packs", name, str(size))


def _current(packs: tuple[Path, Path], state: str) -> dict | None:
    for pack in packs:
        try:
            manifest = json.loads((pack / "manifest.json").read_text())
        except (OSError, ValueError):
            continue
        if manifest["state"] == state:
            return manifest
    return None


def _list(root: Path) -> tuple[Listing, int]:
    """The image files, and how many other files there are."""
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; name the one that holds your images")
    labelled, listing, files = (root / "train").is_dir(), {}, _files(root)
    images, ignored = set(image_files(root, files)), 0
    for path in files:
        split, *rest = path.split("/")
        if split == "unlabeled" or not labelled:
            split = "unlabelled"
        named = split in ("train", "test") and len(rest) > 1
        if path in images and (named or split == "unlabelled"):
            listing.setdefault(split, {}).setdefault(rest[0] if named else "", []).append(path)
        else:
            ignored += 1
    if not listing or labelled and "train" not in listing:
        raise UserError(f"--data-root {root}: no images ({ignored} other files); expected "
                        "train/CLASS/*, or images and no folder train/")  # fmt: skip
    train, test = listing.get("train", {}), listing.get("test", {})
    for unknown in test.keys() - train.keys():
        raise UserError(f"{root / 'test' / unknown}: no such class in train/; rename or add it")
    if train:
        listing["train"] = {name: train[name] for name in sorted(train)}
    if test:
        listing["test"] = {name: test.get(name, []) for name in sorted(train)}
    return listing, ignored


def image_files(root: Path, files: list[str] | None = None) -> list[str]:
    """Those below `root` whose ending is that of a format which Pillow reads."""
    known = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = _files(root) if files is None else files
    return [path for path in files if os.path.splitext(path)[1].lower() in known]


def file_names(root: Path, data: DataConfig, split: str) -> list[str]:
    """The files of a split, relative to `root`, in the order of its images."""
    listing, _ = _list(root)
    manifest = _current(_packs(root, data.store_size), _state(root, listing))
    if not manifest:
        raise UserError(f"--data-root {root}: has changed since it was packed; start again")
    skipped = {name for name, _ in manifest["skipped"]}
    return [f for files in listing[split].values() for f in files if f not in skipped]


def _files(root: Path) -> list[str]:
    """All files below `root` that are not hidden, sorted; links are followed, but not upwards."""
    found = []
    for where, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(where) + "/"
        folders[:] = [f for f in folders if f[0] != "."
                      and not real.startswith(os.path.realpath(f"{where}/{f}") + "/")]  # fmt: skip
        found += [os.path.relpath(f"{where}/{n}", root) for n in names if n[0] != "."]
    return sorted(found)


def _state(root: Path, listing: Listing) -> str:
    """A digest of the names, sizes and times of all files."""
    digest = hashlib.sha256(str(FORMAT).encode())
    for path in (p for by_class in listing.values() for paths in by_class.values() for p in paths):
        full = root / path
        status = full.stat() if full.exists() else full.lstat()  # a dead link is not readable
        digest.update(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return digest.hexdigest()


def _pack(root: Path, listing: Listing, pack: Path, manifest: dict, size: int) -> None:
    """Fill the folder `pack`, replacing it only once everything is written."""
    partial = pack.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for split, by_class in listing.items():
            counts = _write(partial / f"{split}.npy", root, by_class, size, manifest["skipped"])
            manifest["counts"][split] = counts
            needed = counts if split != "test" or not any(counts.values()) else {}
            for name in (name for name in needed if not counts[name]):
                raise UserError(f"{root / split / name}: no image there can be read: "
                                f"{manifest['skipped'][-1]}")  # fmt: skip
        (partial / "manifest.json").write_text(json.dumps(manifest))
        shutil.rmtree(pack, ignore_errors=True)
        os.rename(partial, pack)
    except OSError as error:
        raise UserError(f"--data-root: cannot write {pack}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"packed {root} at {size} px in {pack}; {manifest['ignored']} other files ignored")


def _write(path: Path, root: Path, by_class: dict, size: int, skipped: list) -> dict[str, int]:
    """Stream a split to a .npy file; the number of readable images of each class.

    Written rather than memory-mapped, so that a full disk is an error and not a SIGBUS.
    """
    counts, total = dict.fromkeys(by_class, 0), sum(map(len, by_class.values()))
    with (
        open(path, "wb") as file,
        tqdm(total=total, desc=f"packing {path.stem}", unit=" images", disable=None) as bar,
    ):
        _header(file, 0, size)
        for name, files in by_class.items():
            decoded = decode_all([root / f for f in files], size)
            for file_name, pixels in zip(files, decoded, strict=True):
                if isinstance(pixels, str):
                    skipped.append([file_name, pixels])
                else:
                    file.write(pixels)
                    counts[name] += 1
                bar.update()
        _header(file, sum(counts.values()), size)
    return counts


def _header(file, count: int, size: int) -> None:
    """numpy leaves room for the first number to grow, so each header has the same length."""
    file.seek(0)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
    np.lib.format.write_array_header_1_0(file, header)


def _try(path: Path, size: int) -> np.ndarray | str:
    """The image, or why it cannot be read."""
    try:
        return decode(path, size)
    except Exception as error:  # Pillow's formats raise anything, SyntaxError and struct.error too
        return " ".join(str(error).split()) or type(error).__name__
