"""The embedded sample: 13,000 images of Fashion-MNIST, 28x28 gray, class-balanced.

    python -m data.sample                 # recreates its file; downloads 30 MB to ./datasets

Fashion-MNIST is the work of Zalando SE (https://github.com/zalandoresearch/fashion-mnist), under
the MIT license beside the sample.  1,000 labelled and 8,000 unlabelled images come from its
training split, 4,000 test images from its test split, in an order drawn once with seed 0.
"""

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


def make() -> None:
    """Recreate the sample's file from the original files, bit for bit."""
    from torchvision.datasets import FashionMNIST  # slow to import, and not needed by `load`

    train, test = (FashionMNIST("datasets", train, download=True) for train in (True, False))
    rng = np.random.default_rng(0)
    labelled, unlabelled = _balanced(train.targets.numpy(), [1000, 8000], rng)
    (tested,) = _balanced(test.targets.numpy(), [4000], rng)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        train_images=train.data.numpy()[labelled],
        train_labels=train.targets.numpy().astype(np.uint8)[labelled],
        unlabelled_images=train.data.numpy()[unlabelled],
        test_images=test.data.numpy()[tested],
        test_labels=test.targets.numpy().astype(np.uint8)[tested],
    )
    SAMPLE.write_bytes(lzma.compress(buffer.getvalue(), preset=9))


def _balanced(labels: np.ndarray, counts: list[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Disjoint index sets of sizes `counts`, each with equally many images of every class."""
    classes = [rng.permutation(np.flatnonzero(labels == c)) for c in range(10)]
    sets, start = [], 0
    for count in counts:
        stop = start + count // 10
        sets.append(rng.permutation(np.concatenate([c[start:stop] for c in classes])))
        start = stop
    return sets


if __name__ == "__main__":
    make()
