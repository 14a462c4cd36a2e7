"""Make the embedded sample, `data/sample/`, from the original files of Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python -m data.make_sample /usr/share/datasets/fashion-mnist

Fashion-MNIST is the work of Zalando SE (https://github.com/zalandoresearch/fashion-mnist), under
the MIT licence that stands beside the sample.  1,000 labelled and 8,000 unlabelled images come from
its training split, 4,000 test images from its test split, each class-balanced, in an order drawn
once with seed 0.
"""

import argparse
import gzip
import hashlib
import io
import lzma
from pathlib import Path

import numpy as np

SAMPLE = Path(__file__).parent / "sample" / "fashion_mnist.npz.xz"
SIZES = {"train": 1000, "unlabelled": 8000, "test": 4000}
# Of the unpacked files, so that the sample can be made again bit for bit.
SHA256 = {
    "train-images-idx3": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def read_idx(path: Path, header: int) -> np.ndarray:
    """The bytes of a gzipped IDX file after its header (16 bytes for images, 8 for labels)."""
    raw = gzip.decompress(path.read_bytes())
    if hashlib.sha256(raw).hexdigest() != SHA256[path.name.removesuffix("-ubyte.gz")]:
        raise SystemExit(f"error: {path} does not hold the original data of Fashion-MNIST")
    return np.frombuffer(raw, np.uint8, offset=header)


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder with the four .gz files of Fashion-MNIST")
    source = parser.parse_args().source
    rng = np.random.default_rng(0)
    images = {
        s: read_idx(source / f"{s}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        for s in ("train", "t10k")
    }
    labels = {s: read_idx(source / f"{s}-labels-idx1-ubyte.gz", 8) for s in ("train", "t10k")}
    train, unlabelled = balanced(labels["train"], [SIZES["train"], SIZES["unlabelled"]], rng)
    (test,) = balanced(labels["t10k"], [SIZES["test"]], rng)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        train_images=images["train"][train],
        train_labels=labels["train"][train],
        unlabelled_images=images["train"][unlabelled],
        test_images=images["t10k"][test],
        test_labels=labels["t10k"][test],
    )
    SAMPLE.parent.mkdir(exist_ok=True)
    SAMPLE.write_bytes(lzma.compress(buffer.getvalue(), preset=9))
    print(f"{SAMPLE}: {SAMPLE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
