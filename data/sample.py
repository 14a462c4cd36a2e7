"""The embedded sample: 13,000 images of Fashion-MNIST, 28x28 grey (see make_sample.py)."""

import io
import lzma
from pathlib import Path

import numpy as np

from data.datasets import DataConfig, Dataset
from data.images import Images
from data.make_sample import SAMPLE

CLASSES = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]


def prepare(root: Path, data: DataConfig) -> None:
    """Nothing: it lies in the repository."""


def load(root: Path, data: DataConfig) -> Dataset:
    """1,000 labelled, 8,000 unlabelled and 4,000 test images; `root` is not used."""
    arrays = np.load(io.BytesIO(lzma.decompress(SAMPLE.read_bytes())))
    images = {s: Images([arrays[f"{s}_images"][:, None]]) for s in ("train", "unlabelled", "test")}
    labels = {s: arrays[f"{s}_labels"].astype(np.int64) for s in ("train", "test")}
    return Dataset(
        images["train"],
        labels["train"],
        images["unlabelled"],
        images["test"],
        labels["test"],
        CLASSES,
    )
