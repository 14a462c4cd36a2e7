"""torchrun as a user starts it, watched from outside; what it leaves behind is found and ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from conftest import TINY, metrics, trained

import train_byol
from training.checkpoints import Checkpoints
from training.resume import newest_valid

ROOT = Path(train_byol.__file__).parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def settings(recipe, out, steps=40) -> list:
    return ["--recipe", recipe, "--out", out, "--steps", steps, "--save-every", "5", "--quiet"]


def rows(out) -> int:
    """Steps that are in the metrics, as --log-every 1 writes them."""
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def newest(out) -> int:
    return newest_valid(Checkpoints(out / "checkpoints", 0))["step"]


def equal(out, two) -> bool:
    """Bit for bit: the launcher's processes and the forked ones have one thread each."""
    return trained(out, 40) == trained(two / "run", 40) and metrics(out) == metrics(two / "run")


class Launch:
    """`python ARGUMENTS` in a session of its own, with what it prints in a file."""

    def __init__(self, folder: Path, *arguments) -> None:
        folder.mkdir(exist_ok=True)
        self.log = folder / "log"
        environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment,
            stdout=open(self.log, "w"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.seen: set[int] = set()

    def ranks(self) -> dict[int, int]:
        """rank -> pid of the processes that the launcher started."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                words = (entry / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            if parent == self.process.pid:
                found |= {int(w[5:]): int(entry.name) for w in words if w.startswith(b"RANK=")}
        self.seen |= set(found.values())
        return found

    def until(self, condition, limit: float = 90) -> None:
        """Wait until `condition()` holds."""
        end = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def wait(self, limit: float = 90) -> int:
        """The exit code; afterwards none of its processes is left."""
        code = self.process.wait(limit)
        self.gone(10)
        return code

    def gone(self, limit: float) -> None:
        """Within `limit` seconds all ranks have ended."""
        end = time.monotonic() + limit
        while any(alive(pid) for pid in self.seen):
            assert time.monotonic() < end, f"left over: {self.seen}"
            time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.fixture
def launch(tmp_path):
    """Start processes that are killed at the test's end, whatever happens."""
    started = []

    def start(*arguments) -> Launch:
        started.append(Launch(tmp_path / f"launch{len(started)}", *arguments))
        return started[-1]

    yield start
    for one in started:
        one.ranks()
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait()
        for pid in one.seen:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Recipe and uninterrupted run of two processes on the whole sample."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "tiny.toml").write_text(TINY)
    arguments = [str(a) for a in settings(folder / "tiny.toml", folder / "run")]
    forked.run(lambda: train_byol.main(argv=arguments), ranks=2)
    return folder
