import os
import pickle

import numpy as np
import pytest
from torchvision.datasets import cifar

from core.errors import UserError
from data import cifar10
from data.datasets import DataConfig

NAMES = [f"class{n}" for n in range(10)]


def rows(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def latin(batch) -> bytes:
    """A pickle whose strings are Python 2's: BINSTRING, which Python 3 decodes as it is told."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def item(value):
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        return pickle.dumps(value, 2)[2:-1]  # without its frame

    body = b"".join(text(key) + item(value) for key, value in batch.items())
    return b"\x80\x02}(" + body + b"u."


def write(root):
    """Three images in each of the five train files and four in the test file, in CIFAR's format."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    for seed, name in enumerate(names):
        count = 4 if name == "test_batch" else 3
        labels = [(seed + n) % 10 for n in range(count)]
        # as Python 2 wrote the published files: byte strings, and more than is used
        batch = {b"data": rows(count, seed), b"labels": labels, b"batch_label": b"batch"}
        batch[b"filenames"] = [b"x_%d.png" % n for n in range(count)]
        (folder / name).write_bytes(latin(batch))
    meta = {"label_names": NAMES}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, 2))


@pytest.fixture
def root(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: os.path.exists(path))
    return tmp_path


def test_pixels_and_labels_are_those_of_the_pickles(root):
    cifar10.prepare(root, DataConfig())
    data = cifar10.load(root, DataConfig())
    assert (len(data.train), len(data.test), data.unlabelled) == (15, 4, None)
    assert data.train.shape == (32, 32)
    # CIFAR's rows: 1024 red, 1024 green, 1024 blue, each row by row
    got = data.train.take(np.array([4, 14])).numpy()
    assert np.array_equal(got[0].reshape(-1), rows(3, 1)[1])
    assert np.array_equal(got[1].reshape(-1), rows(3, 4)[2])
    assert np.array_equal(data.test.take(np.array([3])).numpy().reshape(-1), rows(4, 5)[3])
    expected = [(seed + n) % 10 for seed in range(5) for n in range(3)]
    assert data.train_labels.tolist() == expected and data.train_labels.dtype == np.int64
    assert data.test_labels.tolist() == [5, 6, 7, 8]
    assert data.class_names == NAMES


def test_missing_or_damaged_files_are_one_line(root):
    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(b"\x80\x04")
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            cifar10.load(root, DataConfig())
        message = str(caught.value)
        assert "\n" not in message and "--download" in message and str(path.parent) in message
        path.unlink(missing_ok=True)


def test_files_with_another_md5_are_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match="corrupted"):
        cifar10.load(tmp_path, DataConfig())
