"""Make the embedded sample, `data/sample/`, from the original files of Fashion-MNIST.

    python -m data.make_sample            # downloads 30 MB into ./datasets

Fashion-MNIST is the work of Zalando SE (https://github.com/zalandoresearch/fashion-mnist), under
the MIT licence beside the sample.  1,000 labelled and 8,000 unlabelled images come from its
training split, 4,000 test images from its test split, each class-balanced, in an order drawn once
with seed 0.
"""

import io
import lzma

import numpy as np
from torchvision.datasets import FashionMNIST

from data.sample import SAMPLE


def balanced(labels: np.ndarray, counts: list[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Disjoint index sets of the given sizes, each with equally many images of each class."""
    classes = [rng.permutation(np.flatnonzero(labels == c)) for c in range(10)]
    sets, start = [], 0
    for count in counts:
        stop = start + count // 10
        sets.append(rng.permutation(np.concatenate([c[start:stop] for c in classes])))
        start = stop
    return sets


def main() -> None:
    train, test = (FashionMNIST("datasets", train, download=True) for train in (True, False))
    rng = np.random.default_rng(0)
    labelled, unlabelled = balanced(train.targets.numpy(), [1000, 8000], rng)
    (tested,) = balanced(test.targets.numpy(), [4000], rng)
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
    print(f"{SAMPLE}: {SAMPLE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
