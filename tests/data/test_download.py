import functools
import hashlib
import http.server
import socket
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torchvision.datasets.utils as torchvision

from core.errors import UserError
from data import datasets, download, stl10
from data.datasets import DataConfig


class Server:
    """An archive in place of the official one, and the folder made from it."""

    def __init__(self, path: Path, address: str, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.archive, self.root = path / "served.tar.gz", path / "root"
        self.folder = self.root / "set_binary"
        self.url = f"{address}/served.tar.gz"

    def serve(self, names=("train.bin", "test.bin")) -> None:
        """Members of 30 bytes."""
        content = self.archive.with_name("content.bin")
        content.write_bytes(b"x" * 30)
        with tarfile.open(self.archive, "w:gz") as tar:
            for name in names:
                tar.add(content, f"set_binary/{name}")
        self.md5 = hashlib.md5(self.archive.read_bytes()).hexdigest()

    def fetch(self) -> None:
        for name, value in (("url", self.url), ("tgz_md5", self.md5)):
            self.patch.setattr(stl10.STL10, name, value)
        self.patch.setattr(stl10.STL10, "base_folder", self.folder.name)
        stl10.prepare(self.root, DataConfig(download=True))

    def left(self) -> list[str]:
        """What lies below the root, but for the lock."""
        paths = (p.relative_to(self.root) for p in self.root.rglob("*") if p.suffix != ".lock")
        return sorted(map(str, paths))

    def fails(self, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            self.fetch()
        message = str(caught.value)
        assert "\n" not in message and "tar -xzf" in message and self.url in message
        assert all(word in message for word in words), message
        assert self.left() == []


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch) -> Server:
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,)).start()
        server = Server(tmp_path, f"http://127.0.0.1:{web.server_port}", monkeypatch)
        server.serve()
        yield server
        web.shutdown()


@pytest.mark.parametrize(
    "name, words",
    [
        ("stl10", ["no stl10_binary there", "tar.gz yourself", "tar -xzf FILE -C {root}"]),
        ("cifar10", ["no cifar-10-batches-py there", "CIFAR10(DIR, download=True)"]),
        ("svhn", ["no train_32x32.mat there", "SVHN(DIR, download=True)"]),
    ],
)
def test_D5_without_download_the_error_says_what_to_do(tmp_path, name, words):
    root = tmp_path / "root"
    with pytest.raises(UserError) as caught:
        datasets.prepare(DataConfig(dataset=name, data_root=str(root)))
    for word in (f"--data-root {root}: ", "--download", *words):
        assert word.format(root=root) in str(caught.value)
    assert not root.exists()


def test_the_archive_is_unpacked_and_nothing_else_stays(server):
    server.fetch()
    assert server.left() == ["set_binary", "set_binary/test.bin", "set_binary/train.bin"]
    assert (server.folder / "test.bin").read_bytes() == b"x" * 30


def test_data_that_is_there_is_not_touched(server):
    server.folder.mkdir(parents=True)
    server.url = "http://nowhere"
    server.fetch()
    assert server.left() == ["set_binary"]


def test_D3_D4_what_is_not_the_official_archive_is_never_unpacked(server, monkeypatch):
    monkeypatch.setattr(tarfile, "open", lambda *a: pytest.fail("unpacked"))
    whole = server.archive.read_bytes()
    for content in (whole + b"x", whole[:-30], b"<html>moved</html>", b""):
        server.archive.write_bytes(content)
        server.fails("corrupted")


def test_D4_members_outside_the_folder_are_refused(server):
    for name in ("../../../outside", "../../.."):
        server.serve(["train.bin", name])
        server.fails()
    names = {p.name for p in server.archive.parent.iterdir()}
    assert names == {"root", "served.tar.gz", "content.bin"}


def test_D5_an_unreachable_server_is_one_line(server):
    server.url += ".gone"
    server.fails("404")
    server.url = "http://127.0.0.1:1/x"
    server.fails("refused")


def test_D5_a_stalled_server_ends_in_time_and_the_timeout_is_restored(server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        monkeypatch.setattr(download, "TIMEOUT", 0.3)
        start = time.monotonic()
        server.fails("timed out")
        assert time.monotonic() - start < 2
    assert socket.getdefaulttimeout() is None


def test_D6_after_a_failure_or_a_kill_the_next_start_succeeds(server):
    partial = server.root / ".set_binary.partial" / "set_binary"
    partial.mkdir(parents=True)  # as SIGKILL leaves it
    (partial / "train.bin").write_bytes(b"half")
    server.archive.write_bytes(b"rubbish")
    server.fails()
    server.serve()
    server.fetch()
    assert (server.folder / "train.bin").stat().st_size == 30


def test_D6_of_two_processes_only_one_downloads(server, monkeypatch):
    entered, release, count = threading.Event(), threading.Event(), []
    real = torchvision.download_url

    @functools.wraps(real)
    def slow(*arguments):
        count.append(arguments)
        entered.set()
        release.wait(5)
        real(*arguments)

    monkeypatch.setattr(torchvision, "download_url", slow)
    # flock belongs to the open file, so two threads stand in for two processes
    threads = [threading.Thread(target=server.fetch) for _ in range(2)]
    threads[0].start()
    assert entered.wait(5)
    threads[1].start()
    threads[1].join(0.3)
    assert threads[1].is_alive()
    release.set()
    for thread in threads:
        thread.join(5)
    assert len(count) == 1 and server.folder.is_dir()
