"""What a crash, a broken disk or a stranger's file can do to a checkpoint: nothing."""

import ctypes
import errno
import os
import pickle
import resource
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch

from core.errors import RunError, UserError
from core.files import write_atomically
from training import checkpoints as module
from training.checkpoints import Checkpoints, rejected, save_file
from training.distributed import SINGLE
from training.resume import newest_valid, set_aside
from training.run_folder import RunFolder
from training.weights import load_file


def state(value: float) -> dict:
    return {"model": {"weight": torch.full((4000,), value)}, "note": "plain"}


def folder(tmp_path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=keep)
    for step in steps:
        checkpoints.save(step, state(step))
    return checkpoints


def value(found: dict) -> float:
    return found["model"]["weight"][0].item()


def test_what_is_saved_comes_back_with_its_step(tmp_path):
    found = newest_valid(folder(tmp_path, 5))
    assert value(found) == 5 and found["step"] == 5 and found["note"] == "plain"
    assert newest_valid(Checkpoints(tmp_path / "empty", 1)) is None


def test_only_the_newest_stay(tmp_path):
    checkpoints = folder(tmp_path, 8, 9, 10, 100, keep=2)
    assert [p.name for p in checkpoints.list()] == ["step-00000010.pt", "step-00000100.pt"]
    assert len(list(checkpoints.folder.iterdir())) == 4  # each with its checksum, nothing else
    assert value(newest_valid(checkpoints)) == 100


def test_due_at_the_cadence_and_at_the_end(tmp_path):
    def due(every, index, last=False):
        return Checkpoints(tmp_path, every).due(SimpleNamespace(index=index, last=last))

    assert [due(3, k) for k in range(6)] == [False, False, True, False, False, True]
    assert [due(0, k) for k in range(3)] == [False] * 3
    assert due(0, 1, last=True) and due(100, 1, last=True)


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("no pickle of me")


def test_C4_an_object_that_raises_while_pickling_leaves_the_old(tmp_path):
    checkpoints = folder(tmp_path, 1)
    before = {p.name: p.read_bytes() for p in checkpoints.folder.iterdir()}
    with pytest.raises(RuntimeError, match="no pickle"):
        checkpoints.save(2, {"model": Unpicklable()})
    assert {p.name: p.read_bytes() for p in checkpoints.folder.iterdir()} == before


def test_C15_a_full_disk_leaves_the_old_and_no_temporary_file(tmp_path, monkeypatch):
    checkpoints = folder(tmp_path, 1)
    before = {p.name: p.read_bytes() for p in checkpoints.folder.iterdir()}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left.* bytes needed, .* free.*resume"):
        checkpoints.save(2, state(2))
    assert {p.name: p.read_bytes() for p in checkpoints.folder.iterdir()} == before


def save_within(checkpoints, limit: int):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoints.save(2, state(2))
    except RunError as error:
        return str(error)
    return ""


def test_C15_a_file_that_may_not_grow_leaves_the_old(tmp_path):
    checkpoints = folder(tmp_path, 1)
    (text,) = forked.run(save_within, checkpoints, 5000)
    assert "step-00000002.pt: File too large" in text and "bytes needed" in text
    assert len(checkpoints.list()) == 1 and not list(checkpoints.folder.glob(".*.tmp"))
    assert value(newest_valid(checkpoints)) == 1


def save_and_die(checkpoints, function: str, call: int, before: bool):
    """SIGKILL at the `call`-th os.fsync or os.replace of a save, before or after it."""
    original, calls = getattr(os, function), []

    def dying(*args):
        calls.append(args)
        if len(calls) == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, function, dying)
    checkpoints.save(9, state(9))


@pytest.mark.parametrize("old", [[], [1, 2]], ids=["first", "later"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "function, call", [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1), ("replace", 2)]
)
def test_C2_C3_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path, function, call, before, old):
    checkpoints = folder(tmp_path, *old)
    child = forked.Children(save_and_die, checkpoints, function, call, before).wait()[0]
    assert child.code == -signal.SIGKILL
    found = newest_valid(checkpoints)  # never an error: a first save that died is no checkpoint
    if found is None:
        assert not old
    else:
        assert value(found) == (9 if found["step"] == 9 else 2)
    checkpoints.save(10, state(10))
    assert value(newest_valid(checkpoints)) == 10 and len(checkpoints.list()) <= 2


def cut(keep):
    return lambda data: data[: keep(len(data))]


def flip(where):
    def change(data):
        data = bytearray(data)
        data[where(data)] ^= 4
        return bytes(data)

    return change


DAMAGE = {
    "empty": cut(lambda n: 0),
    "half": cut(lambda n: n // 2),
    "without its end": cut(lambda n: n - 100),
    "a bit of a tensor": flip(lambda data: len(data) // 2),
    "a bit of the pickle": flip(lambda data: data.index(b"plain")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_C5_C6_C7_a_damaged_newest_falls_back_with_a_warning(tmp_path, damage, capsys):
    checkpoints = folder(tmp_path, 1, 2)
    newest = checkpoints.list()[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    assert value(newest_valid(checkpoints)) == 1
    warning = capsys.readouterr().err
    assert newest.name in warning and "checksum" in warning


@pytest.mark.parametrize("text", ["", "0" * 64 + "  step-00000002.pt\n", None])
def test_C7_a_damaged_checksum_falls_back_too(tmp_path, text):
    checkpoints = folder(tmp_path, 1, 2)
    path = checkpoints.list()[-1].with_suffix(".sha256")
    path.unlink() if text is None else path.write_text(text)
    assert value(newest_valid(checkpoints)) == 1


def test_C8_all_damaged_is_an_error_that_lists_them(tmp_path):
    checkpoints = folder(tmp_path, 1, 2)
    for path in checkpoints.list():
        path.write_bytes(b"")
    with pytest.raises(UserError) as error:
        newest_valid(checkpoints)
    assert all(p.name in str(error.value) for p in checkpoints.list())


def test_C18_dangling_links_and_strangers_are_no_checkpoints(tmp_path):
    checkpoints = folder(tmp_path, 1)
    for name in ("step-00000008.pt", "step-00000009.pt"):
        (checkpoints.folder / name).symlink_to(tmp_path / "nowhere")
    (checkpoints.folder / "step-00000009.sha256").write_text("0" * 64)
    (checkpoints.folder / "last").symlink_to(tmp_path / "nowhere")
    assert value(newest_valid(checkpoints)) == 1


def test_a_write_that_the_disk_garbles_is_noticed(tmp_path, monkeypatch):
    checkpoints = folder(tmp_path, 1, 2)
    honest = module.write_atomically

    def garble(path, data):
        honest(path, bytes(data)[:-1] + b"?" if path.suffix == ".pt" else data)

    monkeypatch.setattr(module, "write_atomically", garble)
    with pytest.raises(RunError, match="checksum"):
        checkpoints.save(3, state(3))
    assert value(newest_valid(checkpoints)) == 2


def test_C1_leftovers_of_a_kill_are_removed(tmp_path):
    checkpoints = folder(tmp_path, 1)
    (checkpoints.folder / ".step-00000002.pt.tmp").write_bytes(b"half")
    newest_valid(checkpoints)  # not here: another run may be writing it
    assert list(checkpoints.folder.glob(".*"))
    RunFolder(tmp_path, {}, SINGLE, resume=True).close()  # it holds the lock
    assert not list(checkpoints.folder.glob(".*"))


def test_C5_what_is_damaged_does_not_count_among_those_kept(tmp_path):
    checkpoints = folder(tmp_path, 1, 2, 3, keep=3)
    for path in checkpoints.list()[1:]:
        path.write_bytes(b"")
    assert value(newest_valid(checkpoints)) == 1
    set_aside(checkpoints, after=1)
    checkpoints.keep = 2
    checkpoints.save(2, state(4))
    assert [p.name for p in checkpoints.list()] == ["step-00000001.pt", "step-00000002.pt"]
    assert value(newest_valid(checkpoints)) == 4


def test_a_file_is_replaced_and_flushed_in_the_right_order(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, o=original: (calls.append(n), o(*a))[1])
    write_atomically(tmp_path / "a", b"new")
    assert calls == ["fsync", "replace", "fsync"] and (tmp_path / "a").read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


class Evil:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


def evil_zip(path: Path, function, argument) -> None:
    torch.save({"model": Evil(function, argument)}, path)


def evil_legacy(path: Path, function, argument) -> None:
    torch.save({"model": Evil(function, argument)}, path, _use_new_zipfile_serialization=False)


def evil_pickle(path: Path, function, argument) -> None:
    path.write_bytes(pickle.dumps(Evil(function, argument)))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [evil_zip, evil_legacy, evil_pickle])
@pytest.mark.parametrize("kind", ["system", "eval"])
def test_C10_a_malicious_pickle_is_refused_and_not_run(tmp_path, write, kind):
    sentinel, path = tmp_path / "sentinel", tmp_path / "evil.pt"
    if kind == "system":
        write(path, os.system, f"touch {sentinel}")
    else:
        write(path, eval, f"open({str(sentinel)!r}, 'w')")
    with pytest.raises(UserError) as error:
        load_file(path, "--ckpt")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not sentinel.exists()


def test_C10_torchscript_is_refused(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))
    with pytest.raises(UserError) as error:
        load_file(path, "--ckpt")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


STRANGERS = {
    "empty": b"",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "text": b"hello",
}


@pytest.mark.parametrize("content", STRANGERS.values(), ids=STRANGERS)
def test_C9_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_file(path, "--ckpt")
    assert f"--ckpt {path}" in str(error.value) and "\n" not in str(error.value)


def test_C9_a_foreign_zip_a_folder_and_a_missing_file_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    for name in ("x.zip", ".", "missing.pt"):
        with pytest.raises(UserError, match="--init"):
            load_file(tmp_path / name, "--init")


def test_rejected_says_why(tmp_path):
    path = tmp_path / "a.pt"
    assert "No such file" in rejected(path) and "a.pt" in rejected(path)
    save_file(path, state(1))
    assert "No such file" in rejected(path) and "a.sha256" in rejected(path)
    save_file(path, state(1), checksum=True)
    assert rejected(path) == ""


def save_on_a_small_disk(checkpoints, size: int):
    """Saves 2 on a file system of `size` bytes that only this process sees; None without one."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x20000):  # CLONE_NEWUSER, CLONE_NEWNS
        return None
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    folder = bytes(checkpoints.folder.parent)
    if libc.mount(b"none", folder, b"tmpfs", 0, f"size={size}".encode()):
        return None
    checkpoints.save(1, state(1))
    with pytest.raises(RunError) as error:
        checkpoints.save(2, {"weight": torch.ones(size // 4)})
    left = [p.name for p in checkpoints.folder.iterdir() if p.suffix != ".sha256"]
    return str(error.value), left, value(newest_valid(checkpoints))


def test_C15_a_disk_that_is_full_says_how_much_is_needed(tmp_path):
    checkpoints = Checkpoints(tmp_path / "disk" / "checkpoints", 1)
    checkpoints.folder.parent.mkdir()
    (found,) = forked.run(save_on_a_small_disk, checkpoints, 1 << 16)
    if found is None:
        pytest.skip("no file system of one's own on this machine")
    text, left, kept = found
    assert "No space left" in text and "bytes needed" in text and " free)" in text
    assert left == ["step-00000001.pt"] and kept == 1


@pytest.mark.parametrize("where", [b"plain", "tensor"])
def test_C6_C7_a_flipped_bit_is_found_without_a_checksum_beside(tmp_path, where):
    """As in an encoder.pt that was copied somewhere; torch.load alone accepts it."""
    path = tmp_path / "x.pt"
    save_file(path, state(1))
    data = bytearray(path.read_bytes())
    data[data.index(where) if where != "tensor" else len(data) // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(UserError, match="--ckpt .*x.pt: .*damaged"):
        load_file(path, "--ckpt")


def test_C10_nothing_is_unpickled_freely():
    calls = [
        line
        for folder in (".", "byol", "baseline", "variants", "data", "eval", "training")
        for path in (Path(module.__file__).parents[1] / folder).glob("*.py")
        for line in path.read_text().splitlines()
        if "torch.load(" in line or "pickle.load" in line or "allow_pickle" in line
    ]
    assert calls and all("weights_only=True" in line for line in calls), calls
