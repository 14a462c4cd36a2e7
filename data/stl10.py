"""STL-10 (Coates, Ng, Lee 2011), memory-mapped; smaller files of its format are read too."""

from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets import STL10
from torchvision.datasets.utils import download_and_extract_archive

from core.errors import UserError
from data.datasets import DataConfig, Dataset
from data.download import fetch
from data.images import Images

IMAGE = 3 * 96 * 96  # bytes


def prepare(root: Path, data: DataConfig) -> None:
    """Download, check and unpack the archive (2.5 GB) if its folder in `root` is missing."""
    get = partial(download_and_extract_archive, STL10.url, md5=STL10.tgz_md5)
    by_hand = f"fetch {STL10.url} yourself and run: tar -xzf FILE -C {root}"
    fetch(root, [STL10.base_folder], get, data.download, by_hand)


def load(root: Path, data: DataConfig) -> Dataset:
    """Map the files; UserError names a file whose size, labels or folds are wrong."""
    folder = root / STL10.base_folder
    labels, test_labels = _labels(folder / "train_y.bin"), _labels(folder / "test_y.bin")
    train = _images(folder / "train_X.bin", len(labels))
    test = _images(folder / "test_X.bin", len(test_labels))
    unlabelled = None
    if (folder / "unlabeled_X.bin").exists():
        official = 100_000 if len(labels) == 5000 else None
        unlabelled = _images(folder / "unlabeled_X.bin", official)
    names = _read(folder / "class_names.txt").decode(errors="replace").split()
    if len(names) != 10:
        raise _wrong(folder / "class_names.txt", f"{len(names)} names, expected 10")
    folds = _folds(folder / "fold_indices.txt", len(labels))
    return Dataset(train, labels, unlabelled, test, test_labels, names, folds)


def _images(path: Path, count: int | None) -> Images:
    """`count` images, or as many as the file holds."""
    size = path.stat().st_size if path.is_file() else 0
    expected = size // IMAGE if count is None else count
    if size == 0 or size != expected * IMAGE:
        text = f"a multiple of {IMAGE}" if count is None else f"{count * IMAGE} ({count} images)"
        raise _wrong(path, f"{size} bytes, expected {text}")
    columns = np.memmap(path, np.uint8, "r", shape=(expected, 3, 96, 96))  # stored as (n, 3, W, H)
    return Images([columns.transpose(0, 1, 3, 2)])


def _labels(path: Path) -> np.ndarray:
    labels = np.frombuffer(_read(path), np.uint8)
    wrong = np.flatnonzero((labels < 1) | (labels > 10))
    if len(wrong):
        raise _wrong(path, f"label {labels[wrong[0]]} at byte {wrong[0]}, expected 1 to 10")
    return labels.astype(np.int64) - 1


def _folds(path: Path, count: int) -> list[np.ndarray]:
    """Ten arrays of different indices below `count`, one from each line."""
    known = set(range(count))
    try:
        folds = [[int(word) for word in line.split()] for line in _read(path).strip().splitlines()]
    except ValueError:
        folds = []
    valid = [f for f in folds if f and len(set(f)) == len(f) and known.issuperset(f)]
    if len(folds) != 10 or len(valid) != 10:
        raise _wrong(path, f"expected ten lines of different indices from 0 to {count - 1}")
    return [np.array(fold) for fold in folds]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _wrong(path, error.strerror) from None


def _wrong(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; unpack STL-10 again, or delete its folder and --download")
