"""A user's own images: DIR/train/CLASS/*, DIR/test/CLASS/*, DIR/unlabelled/**, or just images.

They are decoded once, to uint8 squares of --store-size in DIR/.byol-pack (or in ./datasets/packs
where that can't be written to), and again when a file comes, goes or changes.
"""

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from core.errors import UserError, printable, warn_once
from core.files import locked
from data.datasets import DataConfig, Dataset
from data.decode import OURS, decode_all
from data.images import Images
from data.listing import Listing, list_images

# (root, size) -> pack, for the `load` that follows: listing a large folder takes seconds
_prepared: dict[tuple[Path, int], Path] = {}


def prepare(root: Path, data: DataConfig) -> Path:
    """The folder with the pack of the images as they are now, which is made if it is missing.

    Images that can't be decoded are left out and named; UserError under --strict.
    """
    listing = list_images(root)
    name = f"{data.store_size}-{listing.state}"
    pack = _find(root, name)
    if pack is None:
        place = _writable_place(root)
        with locked(place / "lock"):
            pack = _find(root, name)  # by another process in the meantime
            if pack is None:
                pack = place / name
                _pack(root, listing, pack, data.store_size)
    skipped = [f"{file} ({why})" for file, why in _manifest(pack)["skipped"] if why != OURS]
    if skipped:
        some = ", ".join(skipped[:3])
        text = printable(f"{len(skipped)} unreadable images in {root}, as {some}")
        if data.strict:
            raise UserError(f"--strict: {text}; replace or remove them")
        warn_once(f"{text}: left out; --strict refuses them")
    _prepared[root.absolute(), data.store_size] = pack
    return pack


def load(root: Path, data: DataConfig) -> Dataset:
    """Map the pack that `prepare` has just found or made; without one, that of the images now."""
    key = root.absolute(), data.store_size
    pack = _prepared.get(key) or prepare(root, data)
    del _prepared[key]
    files = _manifest(pack)["files"]
    parts = dict.fromkeys(("train", "train_labels", "unlabelled", "test", "test_labels"))
    parts["files"] = {}
    for split, by_class in files.items():
        parts["files"][split] = list(itertools.chain.from_iterable(by_class.values()))
        counts = [len(names) for names in by_class.values()]
        shape = (sum(counts), 3, data.store_size, data.store_size)
        parts[split] = Images([np.memmap(pack / f"{split}.bin", np.uint8, "r", shape=shape)])
        if split != "unlabelled":
            parts[f"{split}_labels"] = np.repeat(np.arange(len(counts)), counts)
    return Dataset(**parts, class_names=[printable(name) for name in files.get("train", {})])


def _manifest(pack: Path) -> dict:
    """{"files": split -> class -> files in the pack, "skipped": (file, why it is left out)}."""
    return json.loads((pack / "manifest.json").read_bytes())


def _places(root: Path) -> tuple[Path, Path]:
    """Where packs may lie: beside the images, or in a folder of ./datasets/packs."""
    real = os.path.realpath(root)
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    elsewhere = f"{os.path.basename(real)[:40]}-{digest}"  # a name has 255 bytes at most
    return root / ".byol-pack", Path("datasets", "packs", elsewhere)


def _find(root: Path, name: str) -> Path | None:
    """The pack of that name, if there is one that is whole and can be read."""
    for place in _places(root):
        pack, side = place / name, int(name.split("-")[0])
        try:
            for split, by_class in _manifest(pack)["files"].items():
                size = sum(len(names) for names in by_class.values()) * 3 * side * side
                with open(pack / f"{split}.bin", "rb") as file:
                    if os.fstat(file.fileno()).st_size != size:
                        raise ValueError
            return pack
        except (OSError, ValueError):  # missing, somebody else's, damaged
            continue
    return None


def _writable_place(root: Path) -> Path:
    """The first place where a file can be locked."""
    beside, elsewhere = _places(root)
    try:
        beside.mkdir(exist_ok=True)
        open(beside / "lock", "a").close()
        return beside
    except OSError:  # a read-only disk, somebody else's folder, a file of that name
        return elsewhere


def _pack(root: Path, listing: Listing, pack: Path, size: int) -> None:
    """Write a pack, whole or not at all; older ones of that size in its folder go."""
    partial = pack.with_name(f"{size}.partial")
    files, skipped = {}, []
    for leftover in (partial, pack):  # of a killed process; damaged
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir()
        for split, by_class in listing.files.items():
            files[split], bad = _write(partial / f"{split}.bin", root, by_class, size)
            skipped += bad
        manifest = json.dumps({"files": files, "skipped": skipped})
        (partial / "manifest.json").write_text(manifest, encoding="ascii")
        os.rename(partial, pack)
    except OSError as error:
        raise UserError(f"--data-root: {error.filename or pack}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for old in pack.parent.glob(f"{size}-*"):
        if old != pack:
            shutil.rmtree(old, ignore_errors=True)
    print(printable(f"packed {root} at {size} px in {pack}; ignored: {listing.ignored}"))


def _write(path: Path, root: Path, by_class: dict, size: int) -> tuple[dict, list]:
    """Write a split's images to the file `path`, end to end.

    Returns (class -> files that are in it, (file, why) of those that can't be decoded); UserError
    for a class of which none can be.  Not memory-mapped, so that a full disk is no SIGBUS.
    """
    kept, skipped, brightest = {}, [], 0
    total = sum(len(files) for files in by_class.values())
    bar = tqdm(total=total, desc=f"packing {path.stem}", unit=" images", disable=None)
    with open(path, "wb") as pack, bar:
        for name, files in by_class.items():
            kept[name] = []
            decoded = decode_all([root / file for file in files], size)
            for file, image in zip(files, decoded, strict=True):
                bar.update()
                if isinstance(image, str):
                    skipped.append((file, image))
                else:
                    pack.write(image)
                    kept[name].append(file)
                    brightest = max(brightest, image.max())
            if files and not kept[name]:
                why = printable(f"{root / path.stem / name}: no image can be decoded, as {file}")
                raise UserError(f"{why}: {image}")
    if brightest < 16:
        warn_once(
            f"{path.stem}: all images are nearly black; if 12 bits are stored as 16, spread them"
        )
    return kept, skipped
