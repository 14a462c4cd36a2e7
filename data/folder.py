"""Your own images: DIR/train/CLASS/*, DIR/test/CLASS/*, DIR/unlabelled/**, or images alone.

Without DIR/test/, DIR/val/CLASS/* are the test images, as in ImageNet's layout.  All images are
decoded once, to uint8 squares of --store-size, and again when a file is added, removed or changed.
The pack is in DIR/.byol-pack, or in ./datasets/packs if DIR is read-only.
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

# (root, size) -> pack of `prepare`, so that `load` need not list a large folder again
_prepared: dict[tuple[Path, int], Path] = {}


def prepare(root: Path, data: DataConfig, list_files=list_images) -> None:
    """Pack the images that `list_files(root)` lists, unless they are packed already.

    Images that can't be decoded are left out with a warning; UserError under --strict.
    """
    listing = list_files(root)
    name = f"{data.store_size}-{listing.state}"
    pack = _find(root, name)
    if pack is None:
        place = _writable_place(root)
        with locked(place / "lock"):
            pack = _find(root, name)  # made by another process in the meantime
            if pack is None:
                pack = place / name
                _pack(root, listing, pack, data.store_size)
    skipped = [f"{file} ({why})" for file, why in _manifest(pack)["skipped"] if why != OURS]
    if skipped:
        some = ", ".join(skipped[:3])
        text = printable(f"{len(skipped)} unreadable images in {root}, such as {some}")
        if data.strict:
            raise UserError(f"--strict: {text}; replace or remove them")
        warn_once(f"{text}: left out; --strict refuses them")
    _prepared[root.absolute(), data.store_size] = pack


def load(root: Path, data: DataConfig, list_files=list_images) -> Dataset:
    """Map the images that `prepare` has packed; pack them if it was not called."""
    key = root.absolute(), data.store_size
    if key not in _prepared:
        prepare(root, data, list_files)
    pack = _prepared.pop(key)
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
    """{"files": {split: {class: packed files}}, "skipped": [(file, reason)]}."""
    return json.loads((pack / "manifest.json").read_bytes())


def _places(root: Path) -> tuple[Path, Path]:
    """The two folders that may hold packs: beside the images, and in ./datasets/packs."""
    real = os.path.realpath(root)
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    elsewhere = f"{os.path.basename(real)[:40]}-{digest}"  # file systems limit a name to 255 bytes
    return root / ".byol-pack", Path("datasets", "packs", elsewhere)


def _find(root: Path, name: str) -> Path | None:
    """The pack of that name; None unless it is complete and readable."""
    for place in _places(root):
        pack, side = place / name, int(name.split("-")[0])
        try:
            for split, by_class in _manifest(pack)["files"].items():
                size = sum(len(names) for names in by_class.values()) * 3 * side * side
                with open(pack / f"{split}.bin", "rb") as file:
                    if os.fstat(file.fileno()).st_size != size:
                        raise ValueError
            return pack
        except (OSError, ValueError, KeyError):  # missing, without permission, damaged
            continue
    return None


def _writable_place(root: Path) -> Path:
    """The folder beside the images if a lock file can be made there, else the other."""
    beside, elsewhere = _places(root)
    try:
        beside.mkdir(exist_ok=True)
        open(beside / "lock", "a").close()
        return beside
    except OSError:  # read-only, without permission, or a file of that name
        return elsewhere


def _pack(root: Path, listing: Listing, pack: Path, size: int) -> None:
    """Write a pack, whole or not at all, and remove older ones of that size beside it."""
    partial = pack.with_name(f"{size}.partial")
    files, skipped = {}, []
    for leftover in (partial, pack):  # left by a killed process; a damaged pack
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
    """Write a split's images to `path` and return ({class: files}, [(file, reason)]).

    These are the files written, and those that can't be decoded; UserError if no file of a class
    can be.  `path` is not memory-mapped: a full disk would be a SIGBUS instead of an OSError.
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
                what = f"class {name} in {path.stem}" if name else path.stem
                why = f"no image of {what} can be decoded, for example {file}: {image}"
                raise UserError(printable(f"{root}: {why}"))
    if brightest < 16:
        warn_once(
            f"{path.stem}: all images are nearly black; if they hold 12 bits in 16, rescale them"
        )
    return kept, skipped
