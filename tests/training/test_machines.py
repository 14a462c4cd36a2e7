"""Machines and file systems that lack something: locks, folders that can be flushed, signals."""

import errno
import io
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import filelock
import forked
import pytest
import torch
from conftest import TINY
from launchers import ROOT, newest, rows

from core import errors
from core.errors import RunError, UserError, one_line_errors, put
from core.files import locked, open_locked, write_atomically
from training.command import check_run
from training.config import EvalRun
from training.distributed import SINGLE
from training.encoder import EncoderConfig, build_encoder, fetch
from training.launch import RELAUNCHED, relaunch_if_needed
from training.run_folder import RunFolder
from training.stopping import Watch

LACKING = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.fixture
def no_locks(monkeypatch, request):
    """A file system whose flock answers with that error."""
    import fcntl

    def refuse(file, how):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    errors.warn_once.cache_clear()


@pytest.mark.parametrize("no_locks", LACKING, indirect=True)
def test_without_locks_a_run_starts_with_a_warning(tmp_path, capsys, no_locks):
    with RunFolder(tmp_path / "run", {}, SINGLE), locked(tmp_path / "packs" / "lock"):
        text = capsys.readouterr().err
    assert text.count("\n") == 1 and "the file system has no locks" in text
    assert not list(tmp_path.rglob("*.lock.*"))  # no soft lock, which a kill would leave behind


@pytest.mark.parametrize("no_locks", LACKING[:1], indirect=True)
def test_of_two_processes_one_warns_of_missing_locks(tmp_path, no_locks):
    children = forked.Children(lambda: open_locked(tmp_path / "lock").close(), ranks=2)
    assert ["no locks" in o.output for o in children.wait()] == [True, False]


def test_a_lock_is_seen_by_other_programs_and_goes_with_its_file(tmp_path):
    file = open_locked(tmp_path / "lock")
    other = filelock.FileLock(tmp_path / "lock")
    with pytest.raises(filelock.Timeout):
        other.acquire(timeout=0)
    assert open_locked(tmp_path / "lock") is None
    file.close()
    other.acquire(timeout=0)
    assert open_locked(tmp_path / "lock") is None
    other.release()


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--init imagenet: cannot write .*file/x"):
        with locked(tmp_path / "file" / "x", "--init imagenet"):
            pass


def failing(monkeypatch, number, folders=True):
    """os.fsync fails for folders, or else for files."""
    honest = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}") is folders:
            raise OSError(number, os.strerror(number))
        return honest(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_folders_that_cannot_be_flushed_are_no_reason_to_stop(tmp_path, monkeypatch, number):
    failing(monkeypatch, number)
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_what_cannot_be_flushed_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, number):
    failing(monkeypatch, number, folders=False)
    with pytest.raises(RunError, match=f"{os.strerror(number)}.*3 bytes needed"):
        write_atomically(tmp_path / "a", b"new")
    assert not list(tmp_path.iterdir())


def test_published_weights_are_fetched_by_one_process(tmp_path, monkeypatch):
    weights = build_encoder(EncoderConfig()).state_dict()

    def download(url, target, prefix):
        assert prefix == "f37072fd" and not os.path.exists(target)
        with open(tmp_path / "log", "a") as log:
            log.write(f"{url}\n")
        time.sleep(0.3)
        torch.save(weights, target)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "new"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    forked.run(fetch, EncoderConfig(init="imagenet"), ranks=3)
    assert (tmp_path / "log").read_text().count("resnet18-f37072fd.pth") == 1


# Terminals


class Gone:
    """A stream whose terminal is closed: its writes fail until it is redirected."""

    encoding = "ascii"

    def __init__(self, path):
        self.file = open(path, "wb", buffering=0)

    def fileno(self):
        return self.file.fileno()

    def write(self, text):
        if os.readlink(f"/proc/self/fd/{self.fileno()}") != os.devnull:
            raise OSError(errno.EIO, "Input/output error")
        return self.file.write(text.encode(self.encoding))

    def flush(self):
        pass


def test_what_cannot_be_printed_any_more_is_dropped(tmp_path):
    stream = Gone(tmp_path / "x")
    for _ in range(2):
        put("text", stream)
    assert (tmp_path / "x").read_bytes() == b""


def test_a_stream_that_was_closed_before_the_start_takes_all_text(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # what Python makes of >&-
    with one_line_errors():
        put("é", sys.stdout)
        assert not sys.stdout.isatty()


@pytest.mark.parametrize("buffering", [0, 4096])
def test_a_full_disk_is_an_error_where_the_result_is_what_is_printed(
    monkeypatch, capsys, buffering
):
    """And not for a run, whose result is in files; also where text waits in a buffer to the end."""
    file = io.TextIOWrapper(open("/dev/full", "wb", buffering), write_through=not buffering)
    monkeypatch.setattr(sys, "stdout", file)
    with pytest.raises(SystemExit, match="1"), one_line_errors():
        print("text")
    error = "error: reading or writing: No space left on device\n"
    assert capsys.readouterr().err == error
    with one_line_errors():
        put("text", sys.stdout)
    assert capsys.readouterr().err == ""
    file.flush()


def test_a_program_that_has_read_enough_ends_ours_without_a_word(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", file := open(writer, "w"))
    with pytest.raises(SystemExit, match="141"), one_line_errors():  # as if by SIGPIPE
        print("text")
    file.close()  # as Python does at its end, when a failure would change the exit code
    assert capsys.readouterr().err == ""


@pytest.mark.faults
@pytest.mark.parametrize("more", ["", "--gpus 2"])
@pytest.mark.parametrize("where", [">/dev/full 2>&1", "2>&1 | true", "<&- >&- 2>&-"])
def test_a_run_whose_output_goes_nowhere_is_done(tmp_path, where, more):
    (tmp_path / "tiny.toml").write_text(TINY)
    words = f"train_byol.py --recipe {tmp_path}/tiny.toml --out {tmp_path}/run {more} {where}"
    script = f"set -o pipefail; {sys.executable} {words}"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, timeout=90)
    assert done.returncode == 0 and (tmp_path / "run" / "result.json").exists()


def test_signs_that_a_terminal_lacks_are_escaped(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open(tmp_path / "x", "w", encoding="ascii"))
    with one_line_errors():
        print("é \udcff 日")
    assert (tmp_path / "x").read_text() == "\\xe9 \\udcff \\u65e5\n"


def in_terminal(arguments, until) -> int:
    """Run python in a terminal of its own, which is closed when `until()` holds; its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *map(str, arguments)])
    os.set_blocking(terminal, False)
    end = time.monotonic() + 90
    while not until() and time.monotonic() < end:
        try:
            os.read(terminal, 10000)
        except BlockingIOError:
            time.sleep(0.02)
    os.close(terminal)
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("it went on")


@pytest.mark.faults
@pytest.mark.parametrize("more, code", [([], 75), (["--gpus", "2"], 1)])
def test_S1_a_closed_terminal_saves_and_stops(tmp_path, more, code):
    """SIGHUP, while nothing can be printed any more; torchrun answers 1 for every failure."""
    out, recipe = tmp_path / "run", tmp_path / "tiny.toml"
    recipe.write_text(TINY)
    flags = ["--recipe", recipe, "--out", out, "--steps", "100000", "--save-every", "0"]
    assert in_terminal(["train_byol.py", *flags, *more], lambda: rows(out) >= 3) == code
    assert newest(out) == rows(out) > 0


@pytest.mark.faults
@pytest.mark.parametrize("more", [[], ["--gpus", "2"]])
def test_S1_under_nohup_a_closed_terminal_changes_nothing(tmp_path, launch, more, monkeypatch):
    out, recipe = tmp_path / "run", tmp_path / "tiny.toml"
    recipe.write_text(TINY)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; it is inherited
    try:
        run = launch("train_byol.py", "--recipe", recipe, "--out", out, "--steps", 60, *more)
    finally:
        signal.signal(signal.SIGHUP, before)
    run.until(lambda: rows(out) >= 3)
    for pid in [run.process.pid, *run.ranks().values()]:
        os.kill(pid, signal.SIGHUP)
    assert run.wait() == 0 and rows(out) == 60


@pytest.mark.faults
def test_S10_a_rank_that_waits_for_another_ends_with_the_launcher(tmp_path, launch):
    """The other one is stopped, so that the collective never ends."""
    out, recipe = tmp_path / "run", tmp_path / "tiny.toml"
    recipe.write_text(TINY)
    flags = ["--recipe", recipe, "--out", out, "--steps", 100000, "--gpus", 2]
    run = launch("train_byol.py", *flags)
    run.until(lambda: rows(out) >= 3)
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(1)
    run.process.kill()
    run.seen = {ranks[0]}
    run.gone(5)
    os.kill(ranks[1], signal.SIGCONT)
    run.seen = {ranks[1]}
    run.gone(5)


# Notebooks and programs without a script


@pytest.fixture
def started(monkeypatch) -> list:
    """The commands that a start with --gpus becomes."""
    commands = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: commands.append(command))
    monkeypatch.delenv(RELAUNCHED, raising=False)
    return commands


def test_no_notebook_becomes_a_launcher(started, monkeypatch, tmp_path):
    """%run and a prompt: the script is there, but its process is the notebook's kernel."""
    (tmp_path / "train.py").touch()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    relaunch_if_needed(2, "cpu", [])
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    with pytest.raises(UserError, match="--gpus 2: .*notebook"):
        relaunch_if_needed(2, "cpu", [])
    assert len(started) == 1


@pytest.mark.parametrize("name, origin", [("__main__", "app/__main__.py"), ("cProfile", "x.py")])
def test_what_a_folder_an_archive_or_a_profiler_runs_is_started_by_its_path(
    started, monkeypatch, tmp_path, name, origin
):
    """`python app`, `python app.pyz`, `python -m cProfile train.py`: no module of that name."""
    main = ModuleType("__main__")
    main.__spec__ = SimpleNamespace(name=name, origin=str(tmp_path / origin))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [str(tmp_path)])
    relaunch_if_needed(2, "cpu", ["--x"])
    assert started[0][-3:] == ["--nproc-per-node=2", str(tmp_path), "--x"]


def test_a_thread_trains_without_handlers_of_signals():
    """A notebook's or a window's: Python lets the main thread alone have them."""
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with Watch(SINGLE) as watch:
            found.append((watch.stop, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_a_handler_that_is_not_pythons_cannot_be_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Watch(SINGLE) as watch:
        watch.previous["SIGTERM"] = None  # what signal.signal answers where a program embeds Python
    signal.signal(signal.SIGTERM, before)


# Windows and macOS

HIDE = """
import os, sys
sys.modules["fcntl"] = None  # before filelock, subprocess and tempfile look for it
import signal
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "pthread_kill", "sigwait"):
    delattr(signal, name)
for name in ("fork", "forkpty", "sched_getaffinity", "getuid", "geteuid", "getgid", "setsid",
             "killpg", "O_NOFOLLOW", "O_DIRECTORY", "posix_fallocate", "mkfifo"):
    delattr(os, name)

def opened(path):
    return any(os.path.realpath(f"/proc/self/fd/{n}") == os.path.realpath(path)
               for n in os.listdir("/proc/self/fd"))

def inside(path):  # a folder with an open file in it can't be renamed either
    top = os.path.realpath(path) + "/"
    return any((os.path.realpath(f"/proc/self/fd/{n}") + "/").startswith(top)
               for n in os.listdir("/proc/self/fd"))

def renaming(honest, overwrites):
    def rename(old, new, **more):
        if inside(old) or opened(new) or (os.path.exists(new) and not overwrites):
            raise PermissionError(13, "the file is in use", str(old))
        return honest(old, new, **more)
    return rename

os.rename, os.replace = renaming(os.rename, False), renaming(os.replace, True)
honest_open, honest_unlink = os.open, os.unlink

def open_(path, flags, *more, **named):
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return honest_open(path, flags, *more, **named)

def unlink(path, **more):
    if opened(path):
        raise PermissionError(13, "the file is in use", str(path))
    return honest_unlink(path, **more)

os.open, os.unlink, os.remove = open_, unlink, unlink
"""

DRIVE = """
import sys
import train_byol, linear_eval, finetune, train_baseline
from eval import predict
root, recipe = sys.argv[1:]
flags = ["--recipe", recipe, "--dataset", "folder", "--data-root", f"{root}/images",
         "--store-size", "28", "--batch-size", "8", "--out"]
train_byol.main(argv=[*flags, f"{root}/run", "--save-every", "2", "--knn-every", "4"])
train_byol.main(argv=[*flags, f"{root}/run", "--overwrite", "--stop-after", "4"])
train_byol.main(argv=[*flags, f"{root}/run", "--resume"])
linear_eval.main(["--ckpt", f"{root}/run"])
train_baseline.main([*flags, f"{root}/baseline", "--batch-size", "4"])
finetune.main(["--ckpt", f"{root}/run", "--batch-size", "4"])
lines = predict.main(["--ckpt", f"{root}/run", f"{root}/images/test"])
assert len(lines) == 4 and all(line["class"].isprintable() for line in lines), lines
"""


def test_what_windows_and_macos_lack_is_not_needed(tmp_path):
    """One process trains, evaluates, stops, resumes and predicts where Linux' own is missing.

    The locale encodes ASCII only, as a file of the system's own encoding would be read on Windows.
    """
    from PIL import Image

    for split, count in (("train", 6), ("test", 2)):
        for n, name in enumerate(("café", "thé")):
            for i in range(count):
                path = tmp_path / "images" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (28, 28), (50 * n, 9 * i, 0)).save(path)
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    (tmp_path / "drive.py").write_text(DRIVE, encoding="utf-8")
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(f"# é\n{TINY}", encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}/hide{os.pathsep}{ROOT}", "LC_ALL": "C", "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii",
    }  # fmt: skip
    script = [sys.executable, tmp_path / "drive.py", tmp_path, recipe]
    done = subprocess.run(
        script, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\\udcc3\\udca9" in done.stdout and "Traceback" not in done.stderr  # é, escaped
    assert [p.name for p in tmp_path.glob("run*")].count("run") == 1
    assert len(list(tmp_path.glob("run-2*"))) == 1  # --overwrite has renamed it


def test_a_run_in_a_place_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "images" / "cats").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    images = Path("../images")

    def check(out, overwrite):
        run = EvalRun(out=str(out), overwrite=overwrite)
        check_run(SimpleNamespace(run=run, data=SimpleNamespace(data_root=str(images))))

    check("runs/x", True)
    check(images / "run", True)
    check(".", False)
    check(images / "cats", False)
    (images / "cats" / "1.png").touch()
    for out, overwrite in ((images, False), (images / "cats", False), (".", True), ("..", True)):
        with pytest.raises(UserError, match="choose another"):
            check(out, overwrite)
