"""The data sets by name, the options of [data], and the images for pretraining."""

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.options import option, running
from data.images import Images

PUBLISHED = (  # all are read by data/published.py
    "cifar10 cifar100 mnist fashion_mnist kmnist svhn imagenette flowers102 oxford_iiit_pet "
    "food101 dtd fgvc_aircraft"
).split()
NAMES = ("stl10", "folder", "sample", *PUBLISHED)  # the first three: data/NAME.py


@dataclass
class DataConfig:
    """[data]: images and their sizes."""

    dataset: str = option("stl10", "data set", choices=NAMES)
    data_root: str = running("datasets", "folder of the data (--dataset folder: train/, test/)")
    download: bool = running(False, "download the data set if missing")
    crop_size: int = option(96, "side of the views, pixels", low=8)
    store_size: int = option(160, "side of the squares packed from image files, pixels", low=8)
    eval_size: int = option(
        0,
        "short side before the crop (0: 8/7 of --crop-size; up to 96 pixels whole, or enlarged)",
        low=0,
    )
    strict: bool = running(False, "stop at unreadable image files instead of leaving them out")


@dataclass
class PretrainData(DataConfig):
    """[data] of pretraining: images and their sizes."""

    pretrain_on: str = option(
        "train+unlabelled", "images for pretraining", choices=("train+unlabelled", "unlabelled")
    )


@dataclass
class MeasuredData(DataConfig):
    """[data] of an evaluation: images, their sizes, and which are evaluated on."""

    evaluate_on: str = option(
        "test", "validation: labelled train images outside the draw", choices=("test", "validation")
    )


@dataclass
class LabelledData(MeasuredData):
    """[data] of a command that learns from labels: images, their sizes, and the labels used."""

    labels: int = option(0, "number of labelled images to use (0: all)", low=0)
    draw: int = option(0, "seed of the label draw; fewer labels are a subset of more", low=0)
    fold: int = option(-1, "one of STL-10's ten predefined folds (-1: none)", low=-1, high=9)


@dataclass
class TableData(PretrainData, MeasuredData):
    """[data] of reproduce.py: images, their sizes, and which are evaluated on."""


@dataclass
class Dataset:
    """Images and labels (int64, from 0) of a data set; None for those that it does not have."""

    train: Images | None  # labelled
    train_labels: np.ndarray | None
    unlabelled: Images | None
    test: Images | None
    test_labels: np.ndarray | None
    class_names: list[str]
    folds: list[np.ndarray] | None = None
    files: dict[str, list[str]] | None = None  # split -> file names, in the images' order

    def digest(self) -> list:
        """A fingerprint of the images, their labels and the classes' names."""
        images = [x.digest() for x in (self.train, self.unlabelled, self.test) if x is not None]
        labels = [y.tobytes() for y in (self.train_labels, self.test_labels) if y is not None]
        classes = repr(self.class_names).encode()
        return [*images, hashlib.sha256(b"".join([*labels, classes])).hexdigest()[:16]]

    def pretraining(self, pretrain_on: str) -> tuple[Images, np.ndarray]:
        """Images to pretrain on and their labels, -1 where unknown."""
        if self.unlabelled is None:
            if pretrain_on == "unlabelled":
                raise UserError("--pretrain-on unlabelled: this data set has no unlabelled images")
            return self.train, self.train_labels
        unknown = np.full(len(self.unlabelled), -1)
        if pretrain_on == "unlabelled" or self.train is None:
            return self.unlabelled, unknown
        images = Images(self.train.parts + self.unlabelled.parts)
        return images, np.concatenate([self.train_labels, unknown])


def prepare(data: DataConfig) -> None:
    """Download and pack what is missing, under a lock, before any process group exists."""
    _module(data.dataset).prepare(Path(data.data_root), data)


def load(data: DataConfig) -> Dataset:
    """Open the data set and check its sizes and labels; large files are memory-mapped."""
    return _module(data.dataset).load(Path(data.data_root), data)


def _module(name: str):
    return importlib.import_module(f"data.{'published' if name in PUBLISHED else name}")
