"""CIFAR-10: torchvision's download, turned once into arrays that can be memory-mapped."""

import os
import socket
from pathlib import Path

import numpy as np

from data.datasets import DataConfig, Dataset
from data.images import Images
from data.locking import locked
from training.config import UserError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer",
           "dog", "frog", "horse", "ship", "truck"]  # fmt: skip
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"


def _pack(root: Path, split: str, kind: str) -> Path:
    return root / "packs" / f"cifar10-{split}-{kind}.npy"


def prepare(root: Path, data: DataConfig) -> None:
    """Write `root`/packs/cifar10-*.npy where they are missing."""
    packs = [_pack(root, s, k) for s in ("train", "test") for k in ("images", "labels")]
    if all(pack.exists() for pack in packs):
        return
    with locked(root / "packs" / "cifar10.lock"):
        if all(pack.exists() for pack in packs):
            return
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)  # seconds; torchvision itself would wait for ever
        try:
            for split in ("train", "test"):
                _convert(root, split, data.download)
        except Exception as error:  # urllib, tarfile, pickle and torchvision raise many kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"--data-root: CIFAR-10 at {root}: {reason}; add --download (170 MB), or fetch "
                f"{URL} and run: tar -xzf FILE -C {root}"
            ) from error
        finally:
            socket.setdefaulttimeout(before)


def _convert(root: Path, split: str, download: bool) -> None:
    from torchvision.datasets import CIFAR10  # slow to import, and needed once

    source = CIFAR10(root, train=split == "train", download=download)
    arrays = {"images": source.data.transpose(0, 3, 1, 2), "labels": np.array(source.targets)}
    for kind, array in arrays.items():
        pack = _pack(root, split, kind)
        partial = pack.with_suffix(".partial")
        with open(partial, "wb") as file:
            np.save(file, np.ascontiguousarray(array))
        os.replace(partial, pack)


def load(root: Path, data: DataConfig) -> Dataset:
    """50,000 train and 10,000 test images of 32x32; no unlabelled ones."""
    parts = []
    for split in ("train", "test"):
        images, labels = _pack(root, split, "images"), _pack(root, split, "labels")
        try:
            parts += [Images([np.load(images, mmap_mode="r")]), np.load(labels)]
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{images}: {error}; delete {images.parent} and start again") from None
        if len(parts[-2]) != len(parts[-1]):
            raise UserError(f"{images}: {len(parts[-2])} images but {len(parts[-1])} labels; "
                            f"delete {images.parent} and start again")  # fmt: skip
    train, labels, test, test_labels = parts
    return Dataset(train, labels, None, test, test_labels, CLASSES)
