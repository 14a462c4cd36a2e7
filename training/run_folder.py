"""The run folder: config.json, metrics.jsonl, TensorBoard, the lock, and one progress bar."""

import contextlib
import functools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from core.errors import UserError
from core.files import open_locked, read_json, remove_leftovers, write_atomically, write_json
from core.options import differences
from training.distributed import Processes, sum_over_ranks

SECONDS_A_LINE = 30  # where there is no terminal for a progress bar


def say(processes: Processes, text: str) -> None:
    """Print on the main process only, unless --quiet."""
    if processes.main and not processes.quiet:
        tqdm.write(text)


def warn(processes: Processes, text: str) -> None:
    """One line on stderr from the main process, also with --quiet."""
    if processes.main:
        tqdm.write(f"warning: {text}", file=sys.stderr)


def check_free(out: Path, resume: bool, overwrite: bool) -> None:
    """UserError where `out` holds another run, or can't be a folder; before any work starts."""
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"--out {out}: a file is in its place ({there})")
    if not str(out).isprintable():  # TensorBoard can't write there
        raise UserError(f"--out {out!s:.200}: choose a name that can be printed, in UTF-8")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {there} can't be written to; choose another --out")
    if (out / "config.json").exists() and not (resume or overwrite):
        raise UserError(
            f"--out {out} holds a run: --overwrite renames it away, --resume continues a training; "
            "or choose another --out"
        )


def check_place(out: Path, data_root: Path, overwrite: bool) -> None:
    """UserError where a run in `out` would lie among images, or --overwrite rename them away."""
    images, real = data_root.resolve(), out.resolve()
    names = set(os.listdir(real)) if real.is_dir() else set()
    foreign = names and not names & {".lock", "settings.json"}  # of no run and no table
    if real == images or (foreign and real.is_relative_to(images)):
        raise UserError(f"--out {out}: a folder of images, in --data-root; choose another")
    for inside in (Path.cwd(), images):
        if overwrite and inside.is_relative_to(real):
            raise UserError(f"--overwrite: would rename {inside} with --out {out}; choose another")


def finished(out: Path, config) -> dict | None:
    """result.json where --resume meets a finished run; UserError where its settings differ."""
    if not (config.run.resume and (out / "config.json").exists()):
        return None
    changed = ", ".join(differences(config, read_json(out / "config.json").get("config", {})))
    done = (out / "result.json").exists()
    if changed and not config.run.override:
        what = f"--out {out} holds a finished run of other settings" if done else "--resume"
        raise UserError(
            f"{what}: these differ from the run's: {changed} (--override trains on with them)"
        )
    return read_json(out / "result.json") if done and not changed else None


class RunFolder:
    """Where one run writes.  Only the main process touches files; all must call `log`.

    config   for config.json, if that is to be written at once
    """

    def __init__(
        self, out: Path, config: dict | None, processes: Processes, *, resume=False, overwrite=False
    ) -> None:
        self.out, self.processes, self.board, self.bar = out, processes, None, None
        self.lock = self.metrics = None
        self.next_line = time.monotonic() + SECONDS_A_LINE
        self.clock, self.images, self.total = time.perf_counter(), 0, 0
        if not processes.main:
            return
        check_free(out, resume, overwrite)
        if overwrite and not resume and (out / "config.json").exists():
            self._take_lock()  # not from under a run that is still writing
            self.lock.close()  # Windows renames no folder with an open file in it
            stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}"
            old = Path(os.path.abspath(out))
            try:
                old.rename(old.with_name(f"{old.name}-{stamp}"))
            except OSError as error:
                raise UserError(
                    f"--overwrite: {out} can't be renamed away ({error.strerror}); "
                    "choose another --out"
                ) from None
        out.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        remove_leftovers(out)
        remove_leftovers(out / "checkpoints")
        if config is not None:
            self.write_config(config)

    def write_config(self, config: dict, done: int = 0, changed: bool = False) -> None:
        """Write config.json once; after --override the old one is config-until-STEP.json."""
        if not self.processes.main or ((self.out / "config.json").exists() and not changed):
            return
        for old in (self.out / "config.json", self.out / "result.json"):
            kept = old.with_stem(f"{old.stem}-until-{done}")
            while kept.exists():
                kept = kept.with_stem(f"{kept.stem}+")
            if old.exists():
                old.replace(kept)
        facts = {"config": config, "command": sys.argv, **_provenance()}
        write_json(self.out / "config.json", facts)

    def _take_lock(self) -> None:
        """One process per folder; the OS releases the lock when its holder dies."""
        self.lock = open_locked(self.out / ".lock")
        if self.lock is None:
            with open(self.out / ".lock", encoding="ascii") as file:
                file.seek(1)
                raise UserError(f"--out {self.out}: in use by process {file.read()}")
        self.lock.truncate(0)
        self.lock.write(f" {os.getpid()}")
        self.lock.flush()

    def begin(self, start: int, stop: int, label: str, batch_size: int) -> None:
        """Open the metrics for steps start .. stop-1; rows of later steps are cut away."""
        self.total = stop
        if not self.processes.main:
            return
        path = self.out / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] < start]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        if not path.exists() or path.read_bytes() != text.encode():
            write_atomically(path, text.encode())
        self.metrics = open(path, "a", buffering=1, encoding="utf-8", newline="\n")
        from training.tensorboard import TensorBoard  # slow to import

        self.board = TensorBoard(self.out, start)
        self.bar = tqdm(
            total=stop * batch_size,
            initial=start * batch_size,
            desc=label,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            disable=self.processes.quiet or not sys.stderr.isatty(),
        )
        self.clock = time.perf_counter()

    def log(self, step, every: int, **extra: float) -> None:
        """Write the step's figures every `every` steps, at the first and last, and with `extra`.

        Losses and logged tensors are averaged over the processes; this is the only place that
        reads them from the device.
        """
        self.images += step.images
        if self.bar is not None:
            self.bar.update(step.images)
        if not (extra or step.index % every == 0 or step.last or step.index == self.total - 1):
            return
        tensors = {"loss": step.loss}
        tensors |= {k: v for k, v in step.logs.items() if isinstance(v, torch.Tensor)}
        means = torch.stack([v.detach().double() for v in tensors.values()])
        means = (sum_over_ranks(means) / self.processes.world_size).tolist()
        row = {"step": step.index, "epoch": step.epoch, "lr": step.lr}
        row |= dict(zip(tensors, means, strict=True))
        row |= {k: v for k, v in step.logs.items() if not isinstance(v, torch.Tensor)}
        now = time.perf_counter()
        row["images_per_second"] = round(self.images / (now - self.clock), 1)
        self.clock, self.images = now, 0
        self._write(row | extra)

    def _write(self, row: dict) -> None:
        if not self.processes.main or self.metrics is None:
            return
        self.metrics.write(json.dumps(row) + "\n")
        if self.board is not None:
            self.board.scalars(row)
        knn = f" knn {row['knn_top1']:.1f}" if "knn_top1" in row else ""
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(f"loss {row['loss']:.3f}{knn}", refresh=False)
        elif not self.processes.quiet and (knn or time.monotonic() > self.next_line):
            self.next_line = time.monotonic() + SECONDS_A_LINE
            text = f"step {row['step'] + 1}/{self.total}  loss {row['loss']:.3f} {knn}"
            print(f"{text}  {row['images_per_second']} images/s", flush=True)

    def flush(self) -> None:
        """Rows on the disk before the checkpoint that stands for them."""
        if self.metrics is not None:
            os.fsync(self.metrics.fileno())

    def pause_clock(self, seconds: float) -> None:
        """Take `seconds` of evaluation out of the rate."""
        self.clock += seconds

    def close(self) -> None:
        """Close what is open and give the lock back; safe to call twice."""
        for thing in (self.bar, self.metrics, self.board, self.lock):
            if thing is not None:
                thing.close()
        self.bar = self.metrics = self.board = self.lock = None

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; a line cut short by a crash is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"])})
    return rows


@functools.cache  # it goes into each checkpoint
def git_commit() -> str:
    """The commit of this code, "unknown" outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    settings = dict(cwd=Path(__file__).parent, text=True, timeout=10, stderr=subprocess.DEVNULL)
    try:
        return subprocess.check_output(command, **settings).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _provenance() -> dict:
    import torchvision

    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "host": platform.node(),
        "threads": torch.get_num_threads(),
    }
