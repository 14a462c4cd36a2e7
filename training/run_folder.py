"""The run folder: config.json, metrics.jsonl, TensorBoard and the lock; lines on the screen."""

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from core.errors import UserError, put
from core.files import (
    open_locked,
    read_json,
    read_json_lines,
    remove_leftovers,
    write_atomically,
    write_json,
)
from core.options import differences
from training.distributed import Processes, sum_over_ranks

SECONDS_A_LINE = 15  # between the lines that a run prints


def say(processes: Processes, text: str) -> None:
    """Print on the main process only, unless --quiet."""
    if processes.main and not processes.quiet:
        put(text, sys.stdout)


def warn(processes: Processes, text: str) -> None:
    """One line on stderr from the main process, also with --quiet."""
    if processes.main:
        put(f"warning: {text}", sys.stderr)


def check_free(out: Path, resume: bool, overwrite: bool) -> None:
    """UserError where `out` can't be this run's folder, before any work starts."""
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(f"--out {out}: {there} is no folder to write to; choose another --out")
    if not str(out).isprintable():  # TensorBoard can't write there
        raise UserError(f"--out {out!s:.200}: choose a name that can be printed, in UTF-8")
    if (out / "config.json").exists() and not (resume or overwrite):
        raise UserError(
            f"--out {out} holds a run: --overwrite renames it away, --resume continues a training; "
            "or choose another --out"
        )


def finished(out: Path, config) -> dict | None:
    """result.json where --resume meets a finished run; UserError where its settings differ."""
    if not (config.run.resume and (out / "config.json").exists()):
        return None
    changed = ", ".join(differences(config, read_json(out / "config.json").get("config", {})))
    done = (out / "result.json").exists()
    if changed and not config.run.override:
        raise UserError(
            f"--resume: these differ from the run in {out}: {changed} (--override allows it)"
        )
    return read_json(out / "result.json") if done and not changed else None


class RunFolder(contextlib.ExitStack):
    """Where one run writes.  All ranks must call `log`; only the main process touches files.

    config   for config.json, if that is to be written at once
    As a context, or by `close`, it closes its files and gives the lock back.
    """

    def __init__(
        self, out: Path, config: dict | None, processes: Processes, *, resume=False, overwrite=False
    ) -> None:
        super().__init__()
        self.out, self.processes = out, processes
        self.board = None  # a TensorBoard of the main process, from `begin` on
        self.next_line = time.monotonic() + SECONDS_A_LINE
        self.images = 0  # since `clock`
        if processes.main:
            check_free(out, resume, overwrite)
            if (out / "settings.json").exists():
                raise UserError(f"--out {out} holds a table of reproduce.py; choose another --out")
            if overwrite and not resume and (out / "config.json").exists():
                self._rename_away()
            out.mkdir(parents=True, exist_ok=True)
            self.enter_context(self._lock())
            remove_leftovers(out)
            remove_leftovers(out / "checkpoints")
        if config is not None:
            self.write_config(config)

    def _rename_away(self) -> None:
        """Put the time into the name of the old run's folder; UserError if it is still in use."""
        self._lock().close()  # Windows renames no folder with an open file in it
        old = Path(os.path.abspath(self.out))
        new = old.with_name(f"{old.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        while new.exists():
            new = new.with_name(f"{new.name}+")
        old.rename(new)

    def _lock(self):
        """The open lock file, with this process's number in it; UserError if another has it."""
        path = self.out / ".lock"
        file = open_locked(path)
        if file is None:
            with open(path, encoding="ascii") as held:
                held.seek(1)
                raise UserError(f"--out {self.out}: in use by process {held.read()}")
        file.truncate(0)
        file.write(f" {os.getpid()}")
        file.flush()
        return file

    def write_config(self, config: dict, done: int = 0, changed: bool = False) -> None:
        """Write config.json once; after --override the old one is config-until-STEP.json.

        So are the results of the old settings, which would pass for those of the new ones.
        """
        if not self.processes.main or ((self.out / "config.json").exists() and not changed):
            return
        for name in ("config.json", "result.json", "encoder.pt", "classifier.pt"):
            old = self.out / name
            kept = old.with_stem(f"{old.stem}-until-{done}")
            while kept.exists():
                kept = kept.with_stem(f"{kept.stem}+")
            if old.exists():
                old.replace(kept)
        facts = {
            "config": config,
            "command": sys.argv,
            "commit": git_commit(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "host": platform.node(),
            "threads": torch.get_num_threads(),
        }
        write_json(self.out / "config.json", facts)

    def begin(self, start: int, stop: int) -> None:
        """Open the metrics for steps start .. stop-1; rows of later steps are cut away."""
        self.total, self.clock = stop, time.perf_counter()
        if self.processes.main:
            path = self.out / "metrics.jsonl"
            rows = [row for row in read_metrics(path) if row["step"] < start]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(path, text.encode())
            file = open(path, "a", buffering=1, encoding="utf-8", newline="\n")
            self.metrics = self.enter_context(file)
            from training.tensorboard import TensorBoard  # slow to import

            self.board = self.enter_context(TensorBoard(self.out, start))

    def log(self, step, every: int, **extra: float) -> None:
        """Write the step's metrics every `every` steps, at the first and last, and with `extra`.

        Losses and logged tensors are averaged over the processes; this is the only place that
        reads them from the device.
        """
        self.images += step.images
        if not (extra or step.index % every == 0 or step.last or step.index == self.total - 1):
            return
        tensors = {"loss": step.loss}
        tensors |= {k: v for k, v in step.logs.items() if isinstance(v, torch.Tensor)}
        means = torch.stack([v.detach().double() for v in tensors.values()])
        means = (sum_over_ranks(means) / self.processes.world_size).tolist()
        now = time.perf_counter()
        rate = self.images / (now - self.clock)
        row = {"step": step.index, "epoch": step.epoch, "lr": step.lr}
        row |= dict(zip(tensors, means, strict=True))
        row |= {k: v for k, v in step.logs.items() if not isinstance(v, torch.Tensor)}
        row |= {"images_per_second": round(rate, 1), **extra}
        self.clock, self.images = now, 0
        if self.processes.main:
            self.metrics.write(json.dumps(row) + "\n")
            self.board.scalars(row)
        if "knn_top1" in row or time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + SECONDS_A_LINE
            knn = f"  knn {row['knn_top1']:.1f}" if "knn_top1" in row else ""
            left = (self.total - step.index - 1) * step.images / rate / 60
            text = f"step {step.index + 1}/{self.total}  loss {row['loss']:.3f}{knn}"
            say(self.processes, f"{text}  {rate:.1f} images/s, {left:.1f} min left")

    def flush(self) -> None:
        """Put the rows on the disk, before the checkpoint that stands for them (main process)."""
        os.fsync(self.metrics.fileno())


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a line cut short by a crash is left out."""
    return [row for row in read_json_lines(path) if isinstance(row.get("step"), int)]


@functools.cache  # it goes into each checkpoint
def git_commit() -> str:
    """The commit of this code, "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    settings = dict(cwd=Path(__file__).parent, text=True, timeout=10, stderr=subprocess.DEVNULL)
    try:
        return subprocess.check_output(command, **settings).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
