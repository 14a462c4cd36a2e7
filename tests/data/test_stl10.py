import numpy as np
import pytest

from core.errors import UserError
from data import stl10
from data.datasets import DataConfig


def image(number):
    """(3, 96, 96), row-major; no two of its channels, rows or columns are alike."""
    c, row, column = np.ogrid[:3, :96, :96]
    return ((row * 2 + column * 5 + c * 11 + number * 3) % 256).astype(np.uint8)


def file_bytes(count, start=0):
    """As the official documentation says: red, green, blue, each column after column."""
    planes = (image(start + n)[c] for n in range(count) for c in range(3))
    return b"".join(plane[:, column].tobytes() for plane in planes for column in range(96))


def write(root, train=20, test=10, unlabelled=5):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for name, count, start in (("train", train, 0), ("test", test, 1000)):
        (folder / f"{name}_X.bin").write_bytes(file_bytes(count, start))
        (folder / f"{name}_y.bin").write_bytes(bytes(n % 10 + 1 for n in range(count)))
    if unlabelled:
        (folder / "unlabeled_X.bin").write_bytes(file_bytes(unlabelled, 5000))
    (folder / "class_names.txt").write_text("".join(f"class{n}\n" for n in range(10)))
    lines = (" ".join(str((n * 3 + fold) % train) for n in range(4)) for fold in range(10))
    (folder / "fold_indices.txt").write_text("\n".join(lines) + "\n")
    return folder


def load(root):
    return stl10.load(root, DataConfig())


def refused(root, *words):
    with pytest.raises(UserError) as caught:
        load(root)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_images_come_out_upright_and_labels_from_zero(tmp_path):
    write(tmp_path)
    data = load(tmp_path)
    assert (len(data.train), len(data.test), len(data.unlabelled)) == (20, 10, 5)
    for images, start in ((data.train, 0), (data.test, 1000), (data.unlabelled, 5000)):
        got = images.take(np.array([3, 0, 4])).numpy()
        assert np.array_equal(got, np.stack([image(start + n) for n in (3, 0, 4)]))
    assert data.train_labels.dtype == np.int64
    assert np.array_equal(data.train_labels, np.arange(20) % 10)
    assert np.array_equal(data.test_labels, np.arange(10))
    assert data.class_names == [f"class{n}" for n in range(10)]
    assert isinstance(data.train.parts[0], np.memmap)


def test_train_and_unlabelled_are_joined_for_pretraining(tmp_path):
    write(tmp_path)
    images, labels = load(tmp_path).pretraining("train+unlabelled")
    assert len(images) == len(labels) == 25
    got = images.take(np.array([21, 2])).numpy()
    assert np.array_equal(got, np.stack([image(5001), image(2)]))


def test_folds_are_the_lines_of_their_file(tmp_path):
    write(tmp_path)
    folds = load(tmp_path).folds
    assert len(folds) == 10 and folds[0].tolist() == [0, 3, 6, 9] and folds[9][0] == 9


def test_unlabelled_images_may_be_missing(tmp_path):
    write(tmp_path, unlabelled=0)
    assert load(tmp_path).unlabelled is None


@pytest.mark.parametrize("name, count", [("train", 20), ("test", 10)])
@pytest.mark.parametrize("change", [-1, -27648, 1, 27648, None])
def test_D1_sizes_that_do_not_match_the_labels(tmp_path, name, count, change):
    path = write(tmp_path) / f"{name}_X.bin"
    content = path.read_bytes()
    content = b"" if change is None else (content + bytes(27648))[: len(content) + change]
    path.write_bytes(content)
    refused(tmp_path, path.name, f"{len(content)} bytes", str(count * 27648), str(count))


@pytest.mark.parametrize("content", [b"", bytes(27647), bytes(5 * 27648 + 1)])
def test_D1_unlabelled_images_must_be_whole(tmp_path, content):
    (write(tmp_path) / "unlabeled_X.bin").write_bytes(content)
    refused(tmp_path, "unlabeled_X.bin", f"{len(content)} bytes", "multiple of 27648")


def test_D1_the_official_set_has_exactly_100000_unlabelled_images(tmp_path):
    folder = write(tmp_path, train=1)
    (folder / "train_y.bin").write_bytes(bytes([1]) * 5000)
    for name, images in (("train_X.bin", 5000), ("unlabeled_X.bin", 99_999)):
        with open(folder / name, "wb") as file:
            file.truncate(images * 27648)  # holes: nothing is written
    refused(tmp_path, "unlabeled_X.bin", str(99_999 * 27648), str(100_000 * 27648))
    with open(folder / "unlabeled_X.bin", "ab") as file:
        file.truncate(100_000 * 27648)
    (folder / "fold_indices.txt").write_text("0 4999\n" * 10)
    assert len(load(tmp_path).unlabelled) == 100_000


@pytest.mark.parametrize("label", [0, 11, 255])
def test_D2_labels_out_of_range(tmp_path, label):
    path = write(tmp_path) / "train_y.bin"
    path.write_bytes(path.read_bytes()[:7] + bytes([label]) + path.read_bytes()[8:])
    refused(tmp_path, "train_y.bin", f"label {label}", "byte 7")


@pytest.mark.parametrize("count", [19, 21])
def test_D2_labels_shorter_or_longer(tmp_path, count):
    (write(tmp_path) / "train_y.bin").write_bytes(bytes([1] * count))
    refused(tmp_path, "train_X.bin", str(20 * 27648), str(count * 27648))


def test_D2_no_labels_at_all(tmp_path):
    (write(tmp_path) / "test_y.bin").write_bytes(b"")
    refused(tmp_path, "test_X.bin", "expected 0 (0 images)")


GOOD = "0 1 2\n"


@pytest.mark.parametrize(
    "text",
    [GOOD * 9, GOOD * 11, GOOD * 9 + "0 20\n", GOOD * 9 + "-1 2\n", GOOD * 9 + "1 1\n",
     GOOD * 9 + "1 x\n", GOOD * 4 + "\n" + GOOD * 5, "", GOOD * 9 + f"{10**30}\n", "\0\xff"],
)  # fmt: skip
def test_D2_malformed_folds(tmp_path, text):
    path = write(tmp_path) / "fold_indices.txt"
    path.write_text(text, encoding="latin-1")
    refused(tmp_path, "fold_indices.txt", "ten lines", "0 to 19")


def test_class_names_must_be_ten(tmp_path):
    (write(tmp_path) / "class_names.txt").write_text("cat\ndog\n")
    refused(tmp_path, "class_names.txt", "2 names, expected 10")


@pytest.mark.parametrize("name", ["train_X.bin", "test_y.bin", "class_names.txt"])
def test_missing_files_are_named(tmp_path, name):
    (write(tmp_path) / name).unlink()
    refused(tmp_path, name)
