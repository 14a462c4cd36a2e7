"""How near training is to the limit of this machine: `python -m benchmarks.throughput`.

Rows: training against the bare step of the same network (fixed views, no records, no checks); the
views alone; the first step after typing a command.  The sides of a row run in turn, A B A B; only
their ratio means something on a shared machine.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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

ROOT = Path(__file__).parents[1]
SIZES = {96: (64, "imagenet"), 32: (128, "small")}  # side, pixels: batch size, stem


def random_images(side: int, count: int = 1024) -> np.ndarray:
    """(count, 3, side, side) uint8, the same at each call."""
    return np.random.default_rng(0).integers(0, 256, (count, 3, side, side), np.uint8)


class Training:
    """BYOL as train_byol.py trains it, `steps` steps at a call; its bare step; its views.

    Each of the three returns the number of images.
    """

    def __init__(self, side: int, steps: int, out: str, device: str = "auto") -> None:
        self.steps, (self.batch, stem) = steps, SIZES[side]
        flags = f"--crop-size {side} --stem {stem} --batch-size {self.batch} --optimizer sgd"
        flags += f" --byol.hidden 1024 --steps 100000 --quiet --device {device} --out {out}"
        config = train_byol.configure(flags.split())
        run = config.run
        processes = start(run.device, run.threads, run.dist_timeout, quiet=True)
        torch.manual_seed(0)
        method = BYOL(build_encoder(config.encoder), config.method)
        data = Images([random_images(side)])
        transform = EvalTransform([0.45, 0.44, 0.41], [0.26, 0.26, 0.27], stored=side)
        views = config.view1, config.view2
        self.loader = Loader.of(config, data, None, views, transform, processes)
        watch = Watch(processes, run.check_every)
        self.session = Session(config, method, self.loader, transform, processes, watch)
        self.iterator = self.session.steps()
        self.fixed_views, _ = next(self.loader.batches(0))

    def __call__(self) -> int:
        """Steps of the loop of train_byol.py."""
        for _ in range(self.steps):
            step = next(self.iterator)
            self.session.log(step)
            self.session.save_if_due(step)
        return self.steps * self.batch

    def bare(self) -> int:
        """The same network on the same tensors again and again: no data, no records, no checks."""
        s = self.session
        for _ in range(self.steps):
            with s.precision.autocast():
                outputs = s.model(*self.fixed_views)
            loss, _ = s.method.loss({k: v.float() for k, v in outputs.items()})
            s.precision.backward(loss)
            s.precision.step(s.optimizer)
            s.optimizer.zero_grad(set_to_none=True)
            s.method.after_step(0.5)
        return self.steps * self.batch

    def views(self) -> int:
        """What the loader does for one step."""
        next(self.loader.batches(0))
        return self.batch


def alternate(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Images a second of each side in each round, after one round that is not counted.

    A side is a function that works off some images and returns how many.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            begun = time.perf_counter()
            images = work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                rates[name].append(images / (time.perf_counter() - begun))
    return rates


def compare(rates: dict[str, list[float]], ours: str, other: str) -> dict[str, float]:
    """Median rates of two sides, and median and range of the ratios of their rounds."""
    ratios = [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
    return {
        ours: statistics.median(rates[ours]),
        other: statistics.median(rates[other]),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def training(options) -> Iterator[tuple[str, dict[str, float]]]:
    """Training / bare step, and the views' share of a step."""
    for side in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            ours = Training(side, 1 if options.tiny else 320 // side, f"{folder}/run")
            sides = {"training": ours, "bare step": ours.bare, "views": ours.views}
            rates = alternate(sides, options.rounds)
            ours.session.folder.close()
        what = f"training / bare step, {side} px, {ours.session.precision.name}"
        yield what, compare(rates, "training", "bare step")
        whole, views = (statistics.median(rates[name]) for name in ("training", "views"))
        yield f"views, {side} px", {"images/s": views, "% of a step": 100 * whole / views}


def start_up(options) -> Iterator[tuple[str, dict[str, float]]]:
    """Seconds from typing a command to its first optimizer step, on the sample."""
    seconds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "train_byol.py", "--recipe", "recipes/sample.toml"]
            path, begun = Path(folder, "run", "metrics.jsonl"), time.perf_counter()
            process = subprocess.Popen([*command, "--quiet", "--out", str(path.parent)], cwd=ROOT)
            while not (path.exists() and path.stat().st_size) and process.poll() is None:
                time.sleep(0.02)
            seconds.append(time.perf_counter() - begun)
            process.kill()
            process.wait()
    median, lowest, highest = statistics.median(seconds), min(seconds), max(seconds)
    yield "first step after typing, s", dict(median=median, lowest=lowest, highest=highest)


def main(description: str, *measurements: Callable) -> None:
    """Print the rows of all measurements, and write them as JSON where that is asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5, help="of each side, in turn [5]")
    parser.add_argument("--tiny", action="store_true", help="a trial; the numbers are worthless")
    parser.add_argument("--json", help="write one object, with a key for each row")
    options = parser.parse_args()
    name, cores = processor(torch.device(pick_device("auto"))), len(os.sched_getaffinity(0))
    machine = (
        f"{name}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    print(machine, flush=True)
    results = {"machine": machine}
    for what, numbers in itertools.chain.from_iterable(rows(options) for rows in measurements):
        results[what] = numbers
        print(f"{what}: {', '.join(f'{k} {v:,.4g}' for k, v in numbers.items())}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(__doc__, training, start_up)
