"""How near training is to the limit of this machine: `python -m benchmarks.throughput`.

Rows: training against the bare step of the same network (fixed views, no records, no checks); the
views alone; the first step after typing a command.  The sides of a row run in turn, A B A B; only
their ratio means something on a shared machine.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import train_byol
from byol.byol import BYOL
from core.device import pick_device
from data.images import Images
from data.loader import Loader
from data.transform import EvalTransform
from reproduce import processor
from training.distributed import start
from training.encoder import build_encoder
from training.session import Session
from training.stopping import Watch

ROOT = Path(train_byol.__file__).parent
SIZES = {96: (64, "imagenet"), 32: (128, "small")}  # side, pixels: batch size, stem
MEAN, STD = [0.45, 0.44, 0.41], [0.26, 0.26, 0.27]


def photographs(count: int, side: int) -> np.ndarray:
    """(count, 3, side, side) uint8 with soft shapes, the same at each call."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (count, 3, 8, 8)).astype(np.float32))
    fine = torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 255)
    return fine.byte().numpy()


class Training:
    """BYOL as train_byol.py trains it, `steps` steps at a call, and its bare step."""

    def __init__(self, side: int, images: int, out: str, steps: int) -> None:
        self.steps, (self.batch, stem) = steps, SIZES[side]
        flags = f"--crop-size {side} --stem {stem} --batch-size {self.batch} --optimizer sgd"
        flags += f" --byol.hidden 1024 --steps 100000 --quiet --out {out}"
        config = train_byol.configure(flags.split())
        r = config.run
        processes = start(r.device, r.threads, r.dist_timeout, quiet=True)
        torch.manual_seed(0)
        method = BYOL(build_encoder(config.encoder), config.method)
        transform, views = EvalTransform(MEAN, STD, stored=side), (config.view1, config.view2)
        data = Images([photographs(images, side)])
        self.loader = Loader.of(config, data, None, views, transform, processes)
        watch = Watch(processes, r.check_every)
        self.session = Session(config, method, self.loader, transform, processes, watch)
        self.iterator = self.session.steps()

    @functools.cached_property
    def fixed(self) -> tuple[torch.Tensor, ...]:
        """The views that the bare step sees again and again."""
        return next(self.loader.batches(0))[0]

    def __call__(self) -> int:
        """Steps of the loop of train_byol.py."""
        for _ in range(self.steps):
            step = next(self.iterator)
            self.session.log(step)
            self.session.save_if_due(step)
        return self.done(self.steps)

    def bare(self) -> int:
        """The same network on the same tensors again and again: no data, no records, no checks."""
        s, views = self.session, self.fixed
        for _ in range(self.steps):
            with s.precision.autocast():
                outputs = s.model(*views)
            loss, _ = s.method.loss({k: v.float() for k, v in outputs.items()})
            s.precision.backward(loss)
            s.precision.step(s.optimizer)
            s.optimizer.zero_grad(set_to_none=True)
            s.method.after_step(0.5)
        return self.done(self.steps)

    def views(self) -> int:
        """What the loader does for a step."""
        next(self.loader.batches(0))
        return self.done(1)

    def done(self, steps: int) -> int:
        """The images of that many steps, once the device has finished them."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return steps * self.batch


def alternate(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Images a second of each side in each round, after one round that is not counted.

    A side is a function that works off some images and returns how many.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            begun = time.perf_counter()
            images = work()
            if number:
                rates[name].append(images / (time.perf_counter() - begun))
    return rates


def row(what: str, rates: dict[str, list[float]], ours: str, other: str) -> dict:
    """Median rate of two sides, and the median of the ratios of neighbouring rounds."""
    ratios = sorted(a / b for a, b in zip(rates[ours], rates[other], strict=True))
    medians = {name: statistics.median(rates[name]) for name in (ours, other)}
    ends = {"lowest": ratios[0], "highest": ratios[-1]}
    return {"what": what, **medians, "ratio": statistics.median(ratios), **ends}


def training(options):
    """Training / bare step, and the views' share of a step."""
    for side in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            ours = Training(side, 1024, f"{folder}/run", 1 if options.tiny else 320 // side)
            sides = {"training": ours, "bare step": ours.bare, "views": ours.views}
            rates = alternate(sides, options.rounds)
            what = f"training / bare step, {side} px, {ours.session.precision.name}"
            ours.session.folder.close()
        yield row(what, rates, "training", "bare step")
        medians = {name: statistics.median(values) for name, values in rates.items()}
        share = 100 * medians["training"] / medians["views"]
        yield {"what": f"views, {side} px", "images/s": medians["views"], "% of a step": share}


def start_up(options):
    """Seconds from typing a command to its first optimizer step, on the sample."""
    seconds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            path, begun = Path(folder, "run", "metrics.jsonl"), time.perf_counter()
            words = [sys.executable, "train_byol.py", "--recipe", "recipes/sample.toml", "--quiet"]
            process = subprocess.Popen([*words, "--out", str(path.parent)], cwd=ROOT)
            while not (path.exists() and path.stat().st_size) and process.poll() is None:
                time.sleep(0.02)
            seconds.append(time.perf_counter() - begun)
            process.kill()
            process.wait()
    yield {"what": "first step after typing, s", "median": statistics.median(seconds),
           "lowest": min(seconds), "highest": max(seconds)}  # fmt: skip


def machine() -> str:
    """Processor, cores and versions in one line."""
    name, cores = processor(torch.device(pick_device("auto"))), len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}"


def main(description: str, rows: dict[str, Callable]) -> None:
    """Measure the rows that are asked for; print them, and write them as JSON."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), help="which ones")
    parser.add_argument("--rounds", type=int, default=5, help="of each side, in turn [5]")
    parser.add_argument("--tiny", action="store_true", help="a trial; the figures are worthless")
    parser.add_argument("--json", help="write one object, with a key for each row")
    options = parser.parse_args()
    print(machine(), flush=True)
    found = {"machine": machine()}
    for name in options.rows:
        for entry in rows[name](options):
            what = entry.pop("what")
            found[what] = entry
            shown = (f"{k} {v:,.{0 if v >= 100 else 2}f}" for k, v in entry.items())
            print(f"{what}: {', '.join(shown)}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(__doc__, {"training": training, "start": start_up})
