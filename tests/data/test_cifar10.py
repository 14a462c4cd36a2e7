import pickle
import shutil

import numpy as np
import pytest
from folders import read_only

from core.errors import UserError
from data import cifar10
from data.datasets import DataConfig


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
    meta = {"label_names": cifar10.CLASSES}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, 2))


@pytest.fixture
def root(tmp_path, monkeypatch):
    import torchvision.datasets.cifar as cifar

    write(tmp_path)
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    return tmp_path


def test_pixels_and_labels_are_those_of_the_pickles(root):
    cifar10.prepare(root, DataConfig())
    data = cifar10.load(root, DataConfig())
    assert (len(data.train), len(data.test), data.unlabelled) == (15, 4, None)
    assert data.train.shape == (32, 32)
    # CIFAR's rows: 1024 red, 1024 green, 1024 blue, each row by row
    got = data.train.gather(np.array([4, 14])).numpy()
    assert np.array_equal(got[0].reshape(-1), rows(3, 1)[1])
    assert np.array_equal(got[1].reshape(-1), rows(3, 4)[2])
    assert np.array_equal(data.test.gather(np.array([3])).numpy().reshape(-1), rows(4, 5)[3])
    expected = [(seed + n) % 10 for seed in range(5) for n in range(3)]
    assert data.train_labels.tolist() == expected and data.train_labels.dtype == np.int64
    assert data.test_labels.tolist() == [5, 6, 7, 8]
    assert data.class_names[0] == "airplane" and data.class_names[9] == "truck"


def test_packs_of_somebody_else_fall_back_to_ours(root, monkeypatch, tmp_path_factory):
    """Its folder is read-only, or belongs to another user: the same images, from ./datasets."""
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    with read_only(monkeypatch, root):
        for _ in range(2):
            cifar10.prepare(root, DataConfig())
            assert cifar10.load(root, DataConfig()).test_labels.tolist() == [5, 6, 7, 8]
    assert not (root / "packs").exists()
    assert len(list(here.rglob("cifar10-*.npy"))) == 4
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with monkeypatch.context() as patch:
        patch.setattr(cifar10, "_convert", lambda *a: pytest.fail("they are there"))
        shutil.copytree(next(here.glob("datasets/packs/*")), root / "packs")
        cifar10.prepare(root, DataConfig())
    assert len(cifar10.load(root, DataConfig()).train) == 15


def test_a_file_in_the_place_of_packs_stays(root, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    (root / "packs").touch(0o777)
    cifar10.prepare(root, DataConfig())
    assert len(cifar10.load(root, DataConfig()).train) == 15 and (root / "packs").is_file()


def test_a_full_disk_is_not_missing_data(root, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="No space left"):
        cifar10.prepare(root, DataConfig())


def test_packs_are_made_once_and_mapped(root):
    cifar10.prepare(root, DataConfig())
    for path in (root / "cifar-10-batches-py").iterdir():
        path.unlink()
    cifar10.prepare(root, DataConfig())
    data = cifar10.load(root, DataConfig())
    assert isinstance(data.train.parts[0], np.memmap)
    assert sorted(p.suffix for p in (root / "packs").iterdir()) == [".lock"] + [".npy"] * 4


def test_a_missing_pack_is_made_again(root):
    cifar10.prepare(root, DataConfig())
    (root / "packs" / "cifar10-test-labels.npy").unlink()
    cifar10.prepare(root, DataConfig())
    assert cifar10.load(root, DataConfig()).test_labels.tolist() == [5, 6, 7, 8]


def test_missing_data_is_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        cifar10.prepare(tmp_path, DataConfig())
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in ("--download", str(tmp_path), cifar10.URL))
    assert not list(tmp_path.rglob("*.npy"))


def test_corrupted_data_is_one_line_and_leaves_no_pack(root):
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(b"\x80\x04")
    with pytest.raises(UserError):
        cifar10.prepare(root, DataConfig())
    assert not list((root / "packs").glob("*test*"))


def test_a_failed_download_is_one_line_and_restores_the_timeout(tmp_path, monkeypatch):
    import socket

    import torchvision.datasets.cifar as cifar

    def download(*args, **kwargs):
        assert socket.getdefaulttimeout()  # torchvision sets none
        raise TimeoutError("timed out\nafter a while")

    monkeypatch.setattr(cifar, "download_and_extract_archive", download)
    with pytest.raises(UserError, match="timed out after a while"):
        cifar10.prepare(tmp_path, DataConfig(download=True))
    assert socket.getdefaulttimeout() is None


def test_packs_that_do_not_fit_together_are_refused(root):
    cifar10.prepare(root, DataConfig())
    np.save(root / "packs" / "cifar10-train-labels.npy", np.zeros(14, np.int64))
    with pytest.raises(UserError, match="15 images but 14 labels"):
        cifar10.load(root, DataConfig())
    (root / "packs" / "cifar10-train-images.npy").write_bytes(b"")
    with pytest.raises(UserError, match="delete"):
        cifar10.load(root, DataConfig())
