"""The data sets by name, and which of their images are used for what."""

import dataclasses
import functools
import hashlib
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.images import Images
from training.config import UserError, option
from training.distributed import first_process

NAMES = ("stl10", "cifar10", "folder", "sample")
FOLDS = (  # a flag of the evaluations
    ("--folds",),
    dict(action="store_true", help="stl10: each of the ten folds, mean and standard deviation"),
)


@dataclass
class DataConfig:
    """[data]: images, their sizes, and which labels may be used."""

    dataset: str = option("stl10", "data set", choices=NAMES)
    data_root: str = option(
        "datasets", "folder of the data (folder: DIR with train/, test/)", trajectory=False
    )
    download: bool = option(False, "fetch stl10 or cifar10 when missing", trajectory=False)
    pretrain_on: str = option(
        "train+unlabelled", "images for pretraining", choices=("train+unlabelled", "unlabelled")
    )
    crop_size: int = option(96, "side of the views, pixels", low=8)
    store_size: int = option(160, "folder: side that images are packed at, pixels", low=8)
    eval_size: int = option(
        0,
        "short side in evaluation (0: the full frame up to 96, else 8/7 crop)",
        low=0,
    )
    strict: bool = option(False, "folder: refuse unreadable images", trajectory=False)
    labels: int = option(0, "labelled images used (0: all)", low=0)
    draw: int = option(0, "which random draw of them; draws are nested in --labels", low=0)
    fold: int = option(-1, "one of STL-10's ten predefined folds (-1: none)", low=-1, high=9)
    evaluate_on: str = option(
        "test", "validation: the labelled images outside the draw", choices=("test", "validation")
    )


@dataclass
class Dataset:
    """What a data set offers; labels are int64, 0-based; any set of images may be absent."""

    train: Images | None  # labelled
    train_labels: np.ndarray | None
    unlabelled: Images | None
    test: Images | None
    test_labels: np.ndarray | None
    class_names: list[str]
    folds: list[np.ndarray] | None = None

    def pretraining(self, pretrain_on: str) -> tuple[Images, np.ndarray]:
        """Images to pretrain on, and their labels, -1 where there are none."""
        if self.unlabelled is None:
            if pretrain_on == "unlabelled":
                raise UserError("--pretrain-on unlabelled: this data set has no unlabelled images")
            return self.train, self.train_labels
        unknown = np.full(len(self.unlabelled), -1)
        if pretrain_on == "unlabelled" or self.train is None:
            return self.unlabelled, unknown
        train, unlabelled = self.train, self.unlabelled
        parts = Images(train.parts + unlabelled.parts, train.column_major)
        return parts, np.concatenate([self.train_labels, unknown])

    def evaluation(self, data: DataConfig) -> "Split":
        """The labelled images that may be used and those that are measured on."""
        wanted = {"train": self.train} | ({"test": self.test} if data.evaluate_on == "test" else {})
        if missing := [split for split, images in wanted.items() if images is None]:
            raise UserError(
                f"this data set has no labelled {' and '.join(missing)} images: "
                f"--data-root needs {' and '.join(f'{split}/CLASS/*' for split in missing)}"
            )
        if len(self.class_names) < 2:
            raise UserError(
                f"this data set has the class {self.class_names[0]!r} alone: "
                "there is nothing to tell apart; --data-root needs two folders in train/"
            )
        if data.fold >= 0:
            if self.folds is None:
                raise UserError(f"--fold {data.fold} (--folds): stl10 alone has folds")
            if data.labels:
                raise UserError(f"--fold {data.fold}: takes all its labels; leave out --labels")
            chosen = self.folds[data.fold]
        else:
            chosen = label_draw(self.train_labels, data.labels, data.draw)
        everything = Labelled(
            self.train, self.train_labels, np.arange(len(self.train)), self.class_names
        )
        train = everything.part(chosen)
        if data.evaluate_on == "test":
            test = Labelled(self.test, self.test_labels, None, self.class_names)
            return Split(train, test)
        rest = np.setdiff1d(everything.index, chosen)
        if not len(rest):
            given = f"--labels {data.labels}" if data.labels else "without --labels, training"
            raise UserError(f"--evaluate-on validation: {given} leaves no labelled image over")
        return Split(train, everything.part(rest))


@dataclass
class Labelled:
    """Images with their labels.  What chooses a setting gets one of these and no test images.

    index   which of the labelled train images they are; None: they are test images
    """

    images: Images
    labels: np.ndarray
    index: np.ndarray | None
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: np.ndarray) -> "Labelled":
        """The rows named."""
        images, labels = self.images.subset(rows), self.labels[rows]
        return Labelled(images, labels, self.index[rows], self.class_names)

    def hold_out(self) -> "Split":
        """Four stratified fifths to learn from and one to choose settings on, inside these.

        The only image of a class is learned from.
        """
        if self.index is None:
            raise ValueError("settings are never chosen on test images")
        if np.unique(self.labels, return_counts=True)[1].max() < 2:
            raise UserError("nothing to choose settings on: each class has one labelled image")
        held = stratified_folds(self.labels, 5)[0]
        return Split(self.part(np.setdiff1d(np.arange(len(self)), held)), self.part(held))


@dataclass
class Split:
    """What is learned from, and what is measured on."""

    train: Labelled
    test: Labelled


def stratified_folds(labels: np.ndarray, count: int, seed: int = 0) -> list[np.ndarray]:
    """Folds with the classes in equal shares: which rows are held out in each.

    The only row of a class is in none of them.
    """
    rng, fold = np.random.default_rng(seed), np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        fold[rows] = np.arange(len(rows)) % count if len(rows) > 1 else -1
    return [np.flatnonzero(fold == f) for f in range(count)]


def each_fold(data: DataConfig, folds: bool) -> list[DataConfig]:
    """The settings for each of STL-10's ten folds, or `data` alone."""
    if folds and (data.labels or data.fold >= 0):
        raise UserError("--folds: all labels of each fold are used; leave out --labels and --fold")
    return [dataclasses.replace(data, fold=f) for f in range(10)] if folds else [data]


def label_draw(labels: np.ndarray, count: int, draw: int) -> np.ndarray:
    """Sorted indices of `count` labels, equally many of each class; draws are nested in count.

    count   0 or their number for all; else a multiple of the classes, at most what there is
    """
    if count in (0, len(labels)):
        return np.arange(len(labels))
    classes = np.unique(labels)
    each = count // len(classes)
    least = min(np.sum(labels == c) for c in classes)
    if count % len(classes) or each > least:
        raise UserError(
            f"--labels {count}: must be a multiple of {len(classes)} classes, and at most "
            f"{least * len(classes)} (the smallest class has {least})"
        )
    rng = np.random.default_rng(np.random.SeedSequence([draw, 0x1ABE1]))
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]
    return np.sort(np.concatenate(chosen))


def printable(name: str) -> str:
    """A name from a disk for people and pages: what can't be shown or encoded is escaped."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in name)


def pack_folders(root: Path, name: str) -> tuple[Path, Path]:
    """Where packs may lie: in `root`, or where that can't be written to, in a folder of ours."""
    real = os.path.realpath(root)
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    ours = f"{os.path.basename(real)[:40]}-{digest}"  # a name has 255 bytes at most
    return root / name, Path("datasets", "packs", ours)


def writable(lock: Path) -> bool:
    """Whether the file can be locked and others be made beside it.

    Not on a read-only disk, in somebody else's folder, or where something else has the name.
    """
    folder = next(p for p in lock.absolute().parents if os.path.lexists(p))
    free = os.path.isfile(lock) and os.access(lock, os.W_OK) or not os.path.lexists(lock)
    return free and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)


def prepare(data: DataConfig) -> None:
    """Download and pack what is missing, under a lock, before any process group exists."""
    _module(data.dataset).prepare(Path(data.data_root), data)


@functools.cache  # once a process
def warn_enlarged(side: int, stored: int) -> None:
    """Say that images with a short side of `stored` pixels are enlarged to `side`."""
    if side > stored and first_process():
        text = f"images of {stored} pixels are enlarged to {side}: lower --crop-size"
        print(f"warning: {text}, or raise --store-size of a folder", file=sys.stderr)


def load(data: DataConfig) -> Dataset:
    """Open the data set; sizes and labels are checked, pixels stay on the disk."""
    return _module(data.dataset).load(Path(data.data_root), data)


def file_names(data: DataConfig, split: str, count: int) -> list[str]:
    """What its images are called: a folder's files, "train/0", "train/1", ... of other data."""
    if data.dataset == "folder":
        return _module("folder").file_names(Path(data.data_root), data, split)
    return [f"{split}/{i}" for i in range(count)]


def _module(name: str):
    return importlib.import_module(f"data.{name}")


def evaluation_sizes(data: DataConfig, store: tuple[int, int]) -> tuple[int, int]:
    """Short side and centre crop for `frame`; (0, 0) is the full frame as stored."""
    if data.eval_size:
        if data.eval_size < data.crop_size:
            raise UserError(
                f"--eval-size {data.eval_size}: must be at least --crop-size {data.crop_size}"
            )
        sizes = data.eval_size, data.crop_size
    elif max(store) <= 96:
        return 0, 0
    else:
        sizes = round(data.crop_size * 8 / 7), data.crop_size
    warn_enlarged(sizes[1], min(store))
    return sizes
