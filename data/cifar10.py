"""CIFAR-10 (Krizhevsky 2009), read by torchvision from its official files."""

from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

from core.errors import UserError
from data.datasets import DataConfig, Dataset
from data.download import fetch
from data.images import Images


def prepare(root: Path, data: DataConfig) -> None:
    """Download, check and unpack the archive (170 MB) if its folder in `root` is missing."""
    fetch(root / CIFAR10.base_folder, CIFAR10.url, CIFAR10.tgz_md5, data.download)


def load(root: Path, data: DataConfig) -> Dataset:
    """50,000 labelled training and 10,000 test images of 32x32, in memory."""
    train, train_labels, names = _read(root, train=True)
    test, test_labels, _ = _read(root, train=False)
    return Dataset(train, train_labels, None, test, test_labels, names)


def _read(root: Path, train: bool) -> tuple[Images, np.ndarray, list[str]]:
    """Images, labels and class names; UserError if a file is missing or damaged."""
    try:
        split = CIFAR10(root, train=train)
    except Exception as error:  # torchvision and pickle raise many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        folder = root / CIFAR10.base_folder
        raise UserError(f"{folder}: {reason}; delete it and start with --download") from error
    pixels = np.ascontiguousarray(split.data.transpose(0, 3, 1, 2))
    return Images([pixels]), np.array(split.targets), split.classes
