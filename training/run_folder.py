"""The run folder: config.json, metrics.jsonl, TensorBoard, lock; and what a run prints."""

import contextlib
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from core.errors import UserError, put
from core.files import lock_folder, read_json, read_json_lines, write_atomically, write_json
from core.options import differences
from training.distributed import Processes, sum_over_ranks

UNTIL = "-until-"  # before the step, in the name of what --override has made outdated
PRINT_EVERY = 15  # seconds between the lines that a run prints


def say(processes: Processes, text: str) -> None:
    """Print on the main process only, unless --quiet."""
    if processes.main and not processes.quiet:
        put(text, sys.stdout)


def warn(processes: Processes, text: str) -> None:
    """One line on stderr from the main process, also with --quiet."""
    if processes.main:
        put(f"warning: {text}", sys.stderr)


def holds_run(out: Path) -> bool:
    """Whether `out` has settings or checkpoints of a run."""
    return (out / "config.json").exists() or any(out.glob("checkpoints/step-*.pt"))


def check_free(out: Path, resume: bool, overwrite: bool) -> None:
    """UserError if `out` can't be written to or holds a run that would be lost."""
    nearest = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        raise UserError(f"--out {out}: {nearest} is not a writable folder; choose another --out")
    if not str(out).isprintable():  # TensorBoard can't write there
        raise UserError(f"--out {out!s:.200}: choose a name of printable UTF-8 characters")
    if holds_run(out) and not (resume or overwrite):
        raise UserError(
            f"--out {out} holds a run: --overwrite renames it away, --resume continues a training; "
            "or choose another --out"
        )


def finished(out: Path, config) -> dict | None:
    """The result if --resume names a finished run, else None; UserError if settings differ."""
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
    """The folder that a run writes to.  All ranks must call `log`; only rank 0 touches files.

    config   settings, written to config.json at once; None: `write_config` follows later
    Leaving the context, or `close`, closes its files and releases the lock.
    """

    def __init__(
        self, out: Path, config: dict | None, processes: Processes, *, resume=False, overwrite=False
    ) -> None:
        super().__init__()
        self.out, self.processes = out, processes
        self.board = None  # rank 0's TensorBoard after `begin`
        self.next_line = time.monotonic() + PRINT_EVERY
        self.images = 0  # since `clock`
        if processes.main:
            check_free(out, resume, overwrite)
            if (out / "settings.json").exists():
                raise UserError(f"--out {out} holds a table of reproduce.py; choose another --out")
            if overwrite and not resume and holds_run(out):
                self._rename_away()
            out.mkdir(parents=True, exist_ok=True)
            self.enter_context(lock_folder(out))
            for folder in (out, out / "checkpoints"):
                for temporary in folder.glob(".*.tmp"):  # from a process killed while writing
                    temporary.unlink(missing_ok=True)
        if config is not None:
            self.write_config(config)

    def _rename_away(self) -> None:
        """Append the time to the name of the old run's folder; UserError if it is in use."""
        lock_folder(self.out).close()  # Windows can't rename a folder with an open file in it
        old = Path(os.path.abspath(self.out))
        new = old.with_name(f"{old.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        while new.exists():
            new = new.with_name(f"{new.name}+")
        old.rename(new)

    def write_config(self, config: dict, done: int = 0, changed: bool = False) -> None:
        """Write config.json if there is none, or replace it if --override has `changed` settings.

        The old one, and the results and evaluations of the old settings, are renamed to
        NAME-until-STEP; the metrics are copied.
        """
        if not self.processes.main or ((self.out / "config.json").exists() and not changed):
            return
        names = ["config.json", "result.json", "encoder.pt", "classifier.pt", "metrics.jsonl"]
        for path in self.out.glob("*/config.json") if changed else ():
            evaluation = "ckpt" in read_json(path).get("config", {}).get("flags", {})
            if evaluation and UNTIL not in path.parent.name:
                names.append(path.parent.name)
        for old in (self.out / name for name in names):
            kept = old.with_stem(f"{old.stem}{UNTIL}{done}")
            while kept.exists():
                kept = kept.with_stem(f"{kept.stem}+")
            if old.name == "metrics.jsonl" and old.exists():
                shutil.copy(old, kept)
            elif old.exists():
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
        """Open the metrics for steps start .. stop-1; rows from `start` on are deleted."""
        self.stop, self.clock = stop, time.perf_counter()
        if self.processes.main:
            path = self.out / "metrics.jsonl"
            rows = [row for row in read_metrics(path) if row["step"] < start]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            write_atomically(path, text.encode())
            file = open(path, "a", buffering=1, encoding="utf-8", newline="\n")
            self.metrics = self.enter_context(file)
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            # purge_step: a resume hides older events of steps from `start` on
            writer = SummaryWriter(str(self.out), purge_step=start or None)
            self.board = self.enter_context(writer)

    def log(self, step, every: int, **extra: float) -> None:
        """Write the metrics of every `every`-th step, the first, the last, and those with `extra`.

        The loss and logged tensors are averaged over the processes, in float64 on a CPU
        (mps has none).  They are copied from the device only here.
        """
        self.images += step.images
        if not (extra or step.index % every == 0 or step.last):
            return
        tensors = {"loss": step.loss}
        tensors |= {k: v for k, v in step.logs.items() if isinstance(v, torch.Tensor)}
        means = torch.stack([v.double() if v.is_cpu else v.float() for v in tensors.values()])
        means = (sum_over_ranks(means.detach()) / self.processes.world_size).tolist()
        now = time.perf_counter()
        rate = self.images / (now - self.clock)
        row = {"step": step.index, "epoch": step.epoch, "lr": step.lr}
        row |= dict(zip(tensors, means, strict=True))
        row |= {k: v for k, v in step.logs.items() if not isinstance(v, torch.Tensor)}
        row |= {"images_per_second": round(rate, 1), **extra}
        self.clock, self.images = now, 0
        if self.processes.main:
            self.metrics.write(json.dumps(row) + "\n")
            for name in [name for name in row if name not in ("step", "epoch")]:
                tag = f"collapse/{name.replace('/', ' ')}" if "/" in name else f"train/{name}"
                self.board.add_scalar(tag, row[name], step.index)
        if "knn_top1" in row or time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + PRINT_EVERY
            knn = f"  knn {row['knn_top1']:.1f}" if "knn_top1" in row else ""
            left = (self.stop - step.index - 1) * step.images / rate / 60
            text = f"step {step.index + 1}/{self.stop}  epoch {step.epoch}  lr {step.lr:.3g}"
            text += f"  loss {row['loss']:.3f}{knn}"
            say(self.processes, f"{text}  {rate:.1f} images/s, {left:.1f} min left")

    def flush(self) -> None:
        """Flush the metrics to the disk, before the checkpoint of their step (rank 0)."""
        os.fsync(self.metrics.fileno())


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without incomplete lines."""
    return [row for row in read_json_lines(path) if isinstance(row.get("step"), int)]


@functools.cache  # every checkpoint asks for it
def git_commit() -> str:
    """The git commit of this code; "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    settings = dict(cwd=Path(__file__).parent, text=True, timeout=10, stderr=subprocess.DEVNULL)
    try:
        return subprocess.check_output(command, **settings).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
