import functools
import gzip
import hashlib
import io
import socket
import tarfile
import threading
import time

import numpy as np
import pytest

from core.errors import UserError
from data import stl10
from data.datasets import DataConfig

DOWNLOAD = DataConfig(download=True)


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
        got = images.gather(np.array([3, 0, 4])).numpy()
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
    got = images.gather(np.array([21, 2])).numpy()
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
    refused(tmp_path, "test_y.bin", "0 bytes")


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


# Download: an archive on the local disk, of small files


def member(name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


SMALL = {"train_X.bin": 30, "train_y.bin": 3, "unlabeled_X.bin": 50,
         "test_X.bin": 20, "test_y.bin": 2}  # fmt: skip
TEXTS = {"fold_indices.txt": b"1 2\n", "class_names.txt": b"a\n"}


def members():
    contents = {name: bytes([size]) * size for name, size in SMALL.items()} | TEXTS
    folder = member("stl10_binary", kind=tarfile.DIRTYPE)
    return [folder, *(member(f"stl10_binary/{n}", c) for n, c in contents.items())]


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Put an archive of these members, or these bytes, where the download comes from."""

    def put(content):
        if isinstance(content, list):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
                for info, data in content:
                    tar.addfile(info, io.BytesIO(data))
            content = buffer.getvalue()
        archive = tmp_path / "served.tar.gz"
        archive.write_bytes(content)
        monkeypatch.setattr(stl10, "URL", archive.as_uri())
        monkeypatch.setattr(stl10, "MD5", hashlib.md5(content).hexdigest())
        return content

    monkeypatch.setattr(stl10, "SIZES", SMALL)
    return put


def left(root):
    """What lies below the root, but for the lock."""
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.name != ".stl10.lock")


def fails(root, *words):
    with pytest.raises(UserError) as caught:
        stl10.prepare(root, DOWNLOAD)
    message = str(caught.value)
    assert "\n" not in message and "tar -xzf" in message and stl10.URL in message
    assert all(word in message for word in words), message
    assert left(root) == []


def test_D5_without_download_the_error_says_what_to_do(tmp_path):
    root = tmp_path / "root"
    with pytest.raises(UserError) as caught:
        stl10.prepare(root, DataConfig())
    for word in (str(root / "stl10_binary"), "--download", stl10.URL, "tar -xzf"):
        assert word in str(caught.value)
    assert not root.exists()


def test_download_unpacks_the_known_members_only(tmp_path, serve):
    serve(members() + [member("stl10_binary/extra.sh", b"x"), member("other/train_X.bin", b"y")])
    stl10.prepare(tmp_path / "root", DOWNLOAD)
    names = [f"stl10_binary/{name}" for name in (*SMALL, *TEXTS)]
    assert left(tmp_path / "root") == sorted(["stl10_binary", *names])
    got = (tmp_path / "root/stl10_binary/unlabeled_X.bin").read_bytes()
    assert got == bytes([50]) * 50


def test_data_that_is_there_is_not_touched(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(stl10, "URL", "file:///nowhere")
    stl10.prepare(tmp_path, DOWNLOAD)
    assert not (tmp_path / ".stl10.lock").exists()


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside", b"x"),
        member("stl10_binary/../../outside", b"x"),
        member("/tmp/stl10-test-outside", b"x"),
        member("stl10_binary/link", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("stl10_binary/hard", kind=tarfile.LNKTYPE, link="stl10_binary/test_y.bin"),
        member("stl10_binary/pipe", kind=tarfile.FIFOTYPE),
        member("stl10_binary/device", kind=tarfile.CHRTYPE),
    ],
    ids=lambda m: m[0].name,
)
@pytest.mark.parametrize("first", [True, False])
def test_D4_dangerous_members_are_refused(tmp_path, serve, bad, first):
    serve([bad, *members()] if first else [*members(), bad])
    fails(tmp_path / "root", repr(bad[0].name), "refused")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["root", "served.tar.gz"]


@pytest.mark.parametrize("change", [-1, 1])
def test_D4_members_of_another_size_are_refused(tmp_path, serve, change):
    parts = [m for m in members() if "test_X" not in m[0].name]
    serve([*parts, member("stl10_binary/test_X.bin", bytes(20 + change))])
    fails(tmp_path / "root", "test_X.bin", f"{20 + change} bytes", "expected 20")


def test_D3_D4_repeated_missing_and_huge_text_members_are_refused(tmp_path, serve):
    serve([*members(), member("stl10_binary/train_y.bin", b"abc")])
    fails(tmp_path / "root", "train_y.bin")
    serve([m for m in members() if "class_names" not in m[0].name])
    fails(tmp_path / "root", "lacks class_names.txt")
    serve([*members()[:-1], member("stl10_binary/class_names.txt", bytes(2 << 20))])
    fails(tmp_path / "root", "class_names.txt", "2097152 bytes")


def test_D3_a_wrong_hash_is_refused_before_unpacking(tmp_path, serve, monkeypatch):
    serve(members())
    monkeypatch.setattr(stl10, "_extract", lambda *a: pytest.fail("unpacked"))
    monkeypatch.setattr(stl10, "MD5", "0" * 32)
    fails(tmp_path / "root", "md5", "0" * 32)


def test_D3_truncated_archives_and_other_files_are_refused(tmp_path, serve):
    whole = serve(members())
    for content in (whole[:-30], whole[: len(whole) // 2], b"<html>moved</html>", b""):
        serve(content)
        fails(tmp_path / "root")
    serve(gzip.compress(gzip.decompress(whole)[: 512 * 3 + 10]))
    fails(tmp_path / "root")


def test_D5_an_unreachable_server_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(stl10, "URL", "file:///no/such/archive")
    fails(tmp_path / "root", "No such file")


def test_D5_a_stalled_server_ends_in_time(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(stl10, "URL", f"http://127.0.0.1:{server.getsockname()[1]}/x")
        monkeypatch.setattr(stl10, "TIMEOUT", 0.3)
        start = time.monotonic()
        fails(tmp_path / "root", "timed out")
        assert time.monotonic() - start < 2


def test_D6_after_a_failure_or_a_kill_the_next_start_succeeds(tmp_path, serve):
    root = tmp_path / "root"
    serve(b"rubbish")
    fails(root)
    (root / ".stl10-partial" / "stl10_binary").mkdir(parents=True)  # as SIGKILL leaves it
    (root / ".stl10-partial" / "stl10_binary" / "train_X.bin").write_bytes(b"half")
    serve(members())
    stl10.prepare(root, DOWNLOAD)
    assert (root / "stl10_binary" / "train_X.bin").stat().st_size == 30
    assert not (root / ".stl10-partial").exists()


def test_D6_of_two_processes_only_one_downloads(tmp_path, serve, monkeypatch):
    serve(members())
    entered, release, count = threading.Event(), threading.Event(), []
    fetch = stl10._fetch

    @functools.wraps(fetch)
    def slow(target):
        count.append(target)
        entered.set()
        release.wait(5)
        return fetch(target)

    monkeypatch.setattr(stl10, "_fetch", slow)
    # flock belongs to the open file, so two threads stand in for two processes
    threads = [threading.Thread(target=stl10.prepare, args=(tmp_path / "root", DOWNLOAD))
               for _ in range(2)]  # fmt: skip
    threads[0].start()
    assert entered.wait(5)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()
    release.set()
    for thread in threads:
        thread.join(5)
    assert len(count) == 1 and (tmp_path / "root" / "stl10_binary").is_dir()
