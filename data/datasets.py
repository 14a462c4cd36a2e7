"""The data sets by name: what they hold, and which images are for pretraining."""

import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.options import option, running
from data.images import Images

NAMES = ("stl10", "cifar10", "folder", "sample")


@dataclass
class DataConfig:
    """[data]: images and their sizes."""

    dataset: str = option("stl10", "data set", choices=NAMES)
    data_root: str = running("datasets", "folder of the data (folder: DIR with train/, test/)")
    download: bool = running(False, "fetch stl10 or cifar10 when missing")
    crop_size: int = option(96, "side of the views, pixels", low=8)
    store_size: int = option(160, "folder: side that images are packed at, pixels", low=8)
    eval_size: int = option(
        0, "short side in evaluation (0: the full frame up to 96, else 8/7 crop)", low=0
    )
    strict: bool = running(False, "folder: refuse unreadable images")


@dataclass
class PretrainData(DataConfig):
    """[data] of pretraining: images and their sizes."""

    pretrain_on: str = option(
        "train+unlabelled", "images for pretraining", choices=("train+unlabelled", "unlabelled")
    )


@dataclass
class MeasuredData(DataConfig):
    """[data] of an evaluation: images, their sizes, and what is measured on."""

    evaluate_on: str = option(
        "test", "validation: the labelled images outside the draw", choices=("test", "validation")
    )


@dataclass
class LabelledData(MeasuredData):
    """[data] of a command that learns from labels: images, their sizes, and the labels used."""

    labels: int = option(0, "labelled images used (0: all)", low=0)
    draw: int = option(0, "which random draw of them; draws are nested in --labels", low=0)
    fold: int = option(-1, "one of STL-10's ten predefined folds (-1: none)", low=-1, high=9)


@dataclass
class TableData(PretrainData, MeasuredData):
    """[data] of reproduce.py: images, their sizes, and what is measured on."""


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
    files: dict[str, list[str]] | None = None  # split -> file names in the order of its images

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


def prepare(data: DataConfig) -> None:
    """Download and pack what is missing, under a lock, before any process group exists."""
    _module(data.dataset).prepare(Path(data.data_root), data)


def load(data: DataConfig) -> Dataset:
    """Open the data set; sizes and labels are checked, pixels stay on the disk."""
    return _module(data.dataset).load(Path(data.data_root), data)


def _module(name: str):
    return importlib.import_module(f"data.{name}")
