"""CIFAR-10: torchvision's download, turned once into arrays that can be memory-mapped."""

import os
import socket
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import locked
from data.datasets import DataConfig, Dataset
from data.images import Images
from data.packs import pack_folders, writable

CLASSES = ["airplane", "automobile", "bird", "cat", "deer",
           "dog", "frog", "horse", "ship", "truck"]  # fmt: skip
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


PARTS = [(split, kind) for split in ("train", "test") for kind in ("images", "labels")]


def _pack(folder: Path, split: str, kind: str) -> Path:
    return folder / f"cifar10-{split}-{kind}.npy"


def _find(root: Path) -> Path | None:
    """The folder that has all packs."""
    places = pack_folders(root, "packs")
    whole = (f for f in places if all(os.access(_pack(f, *part), os.R_OK) for part in PARTS))
    return next(whole, None)


def prepare(root: Path, data: DataConfig) -> None:
    """Write packs/cifar10-*.npy in `root`, or where that can't be done in ours, if missing."""
    if _find(root):
        return
    folder, ours = pack_folders(root, "packs")
    folder = folder if writable(folder / "cifar10.lock") else ours
    with locked(folder / "cifar10.lock"):
        for split in () if _find(root) else ("train", "test"):
            _convert(root, split, data.download, folder)


def _convert(root: Path, split: str, download: bool, folder: Path) -> None:
    source = _read(root, split, download)
    arrays = {"images": source.data.transpose(0, 3, 1, 2), "labels": np.array(source.targets)}
    for kind, array in arrays.items():
        pack = _pack(folder, split, kind)
        partial = pack.with_suffix(".partial")
        partial.unlink(missing_ok=True)  # somebody else's can't be written to
        with open(partial, "wb") as file:
            np.save(file, np.ascontiguousarray(array))
        os.replace(partial, pack)


def _read(root: Path, split: str, download: bool):
    """torchvision's data set; UserError where it is missing or damaged."""
    from torchvision.datasets import CIFAR10  # slow to import, and needed once

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision itself would wait for ever
    try:
        return CIFAR10(root, train=split == "train", download=download)
    except Exception as error:  # urllib, tarfile, pickle and torchvision raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"--data-root: CIFAR-10 at {root}: {reason}; add --download (170 MB), or fetch "
            f"{URL} and run: tar -xzf FILE -C {root}"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def load(root: Path, data: DataConfig) -> Dataset:
    """50,000 train and 10,000 test images of 32x32; no unlabelled ones."""
    parts, folder = [], _find(root) or pack_folders(root, "packs")[0]
    for split in ("train", "test"):
        images, labels = _pack(folder, split, "images"), _pack(folder, split, "labels")
        try:
            parts += [Images([np.load(images, mmap_mode="r")]), np.load(labels)]
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{images}: {error}; delete {images.parent} and start again") from None
        if len(parts[-2]) != len(parts[-1]):
            raise UserError(f"{images}: {len(parts[-2])} images but {len(parts[-1])} labels; "
                            f"delete {images.parent} and start again")  # fmt: skip
    train, labels, test, test_labels = parts
    return Dataset(train, labels, None, test, test_labels, CLASSES)
