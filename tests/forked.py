"""Real processes for tests at the price of a fork: pytest has imported torch already.

Each case runs in children of its own process group, with a gloo group where there are several,
and a time limit.  The parent stays at one thread: a forked child of a thread pool hangs.
"""

import contextlib
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

LIMIT = 60  # seconds


@dataclass
class Outcome:
    """How one child ended: exit code (negative: signal), returned value, traceback, output."""

    code: int
    value: object
    error: str
    output: str


class Children:
    """`ranks` children that run `function(*args)`, started at once; use `wait` or `results`.

    With several ranks, each sees the environment that torchrun would give it and is in a gloo
    group already.
    """

    def __init__(self, function, *args, ranks: int = 1, limit: float = LIMIT) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="forked-"))
        self.deadline = time.monotonic() + limit
        self.pids, self.codes = [], {}
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                self._child(rank, ranks, function, args)
            with contextlib.suppress(OSError):  # the child does the same, whoever comes first
                os.setpgid(pid, self.pids[0] if self.pids else pid)
            self.pids.append(pid)

    def _child(self, rank, ranks, function, args) -> None:
        code, value, error = 1, None, ""
        try:
            os.setpgid(0, self.pids[0] if self.pids else 0)
            output = os.open(self.folder / f"output-{rank}", os.O_WRONLY | os.O_CREAT)
            for stream, number in (("stdout", 1), ("stderr", 2)):
                os.dup2(output, number)
                setattr(sys, stream, os.fdopen(number, "w", buffering=1, closefd=False))
            torch.set_num_threads(1)
            if ranks > 1:
                self._join(rank, ranks)
            value, code = function(*args), 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            error = traceback.format_exc()
        finally:
            (self.folder / f"value-{rank}").write_bytes(pickle.dumps((value, error)))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _join(self, rank: int, ranks: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "test",
                       "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
        store = f"file://{self.folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        dist.barrier()  # a rank with nothing to say would be gone while another still connects

    def poll(self) -> bool:
        """Whether all have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
                    if self.codes[pid]:  # the others may wait for it in vain
                        self.deadline = min(self.deadline, time.monotonic() + 15)
        return len(self.codes) == len(self.pids)

    def until(self, condition) -> None:
        """Wait until `condition()` holds while the children run."""
        while not condition():
            if self.poll() or time.monotonic() > self.deadline:
                raise AssertionError(f"it never happened: {[o.output for o in self.wait()]}")
            time.sleep(0.002)

    def wait(self) -> list[Outcome]:
        """Wait for all, at most until the limit; what is left then is killed with its group."""
        while not self.poll() and time.monotonic() < self.deadline:
            time.sleep(0.002)
        if not self.poll():
            os.killpg(self.pids[0], signal.SIGKILL)
            while not self.poll():
                time.sleep(0.002)
        return [self._outcome(rank, pid) for rank, pid in enumerate(self.pids)]

    def _outcome(self, rank: int, pid: int) -> Outcome:
        path, output = self.folder / f"value-{rank}", self.folder / f"output-{rank}"
        value, error = pickle.loads(path.read_bytes()) if path.exists() else (None, "")
        text = output.read_text() if output.exists() else ""
        return Outcome(self.codes[pid], value, error, text)

    def results(self) -> list:
        """What each rank returned; raises with the first traceback where one failed."""
        outcomes = self.wait()
        for rank, outcome in enumerate(outcomes):
            if outcome.error:
                raise AssertionError(f"rank {rank}:\n{outcome.error}\n{outcome.output}")
        for rank, outcome in enumerate(outcomes):
            if outcome.code:
                raise AssertionError(f"rank {rank} ended with {outcome.code}:\n{outcome.output}")
        return [outcome.value for outcome in outcomes]


def run(function, *args, ranks: int = 1, limit: float = LIMIT) -> list:
    """`function(*args)` in `ranks` forked processes; what each returned."""
    return Children(function, *args, ranks=ranks, limit=limit).results()
