"""A user's own images: DIR/train/CLASS/*, DIR/test/CLASS/*, DIR/unlabelled/**, or just images.

They are decoded once, to uint8 squares of --store-size in DIR/.byol-pack (or in ./datasets/packs
where that can't be written to), and again when a file comes, goes or changes.
"""

import glob
import json
import os
import re
import secrets
import shutil
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.errors import UserError, first_process, printable
from core.files import locked
from data.datasets import DataConfig, Dataset
from data.decode import OURS, decode_all
from data.images import Images
from data.listing import Listing, list_images, some
from data.packs import pack_folders, writable

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
            f"warning: 16-bit images in {some(faint)} use less than a sixteenth of the range and "
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
