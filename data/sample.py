"""The embedded sample: 13,000 images of Fashion-MNIST, 28x28 gray (see make_sample.py)."""

import io
import lzma
from pathlib import Path

import numpy as np

from data.datasets import DataConfig, Dataset
from data.images import Images

SAMPLE = Path(__file__).parent / "sample" / "fashion_mnist.npz.xz"
CLASSES = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")


def prepare(root: Path, data: DataConfig) -> None:
    """Do nothing: the sample is part of the repository."""


def load(root: Path, data: DataConfig) -> Dataset:
    """1,000 labelled, 8,000 unlabelled and 4,000 test images; `root` is not used."""
    arrays = np.load(io.BytesIO(lzma.decompress(SAMPLE.read_bytes())))
    train, unlabelled, test = (
        Images([arrays[f"{split}_images"][:, None]]) for split in ("train", "unlabelled", "test")
    )
    labels, test_labels = (arrays[f"{s}_labels"].astype(np.int64) for s in ("train", "test"))
    return Dataset(train, labels, unlabelled, test, test_labels, CLASSES)
