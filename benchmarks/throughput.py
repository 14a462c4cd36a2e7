"""How near training is to the limit of this machine: `python -m benchmarks.throughput`.

Prints JSON, a line a row.  Training; the bare step of the same network (fixed views, no records, no
checks); the views alone: they run in turn, A B A B, and `ratio` is training's rate through the
row's.  On a shared machine only ratios mean something.  Then the kernels that a step starts on a
GPU, and the seconds from typing a command to its first step.
Flags of train_byol.py, such as `--crop-size 32 --compile`, replace the usual settings.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import train_byol
from benchmarks.launches import count_launches
from byol.byol import BYOL
from core.device import pick_device
from data.images import Images
from data.loader import Loader
from reproduce import processor
from training.distributed import start
from training.session import Session
from training.stopping import Watch

FLAGS = "--optimizer sgd --byol.hidden 1024 --steps 100000 --quiet"
USUAL = {  # flags: steps of a side in a round
    "--crop-size 96 --batch-size 64": 3,
    "--crop-size 32 --batch-size 128 --stem small": 10,
}
Rows = Iterator[tuple[str, dict[str, float]]]


def random_pixels(side: int) -> np.ndarray:
    """1,024 images as uint8 (1024, 3, side, side), the same at each call."""
    return np.random.default_rng(0).integers(0, 256, (1024, 3, side, side), np.uint8)


def build(flags: str) -> Session:
    """A run of train_byol.py on random images."""
    config = train_byol.configure(flags.split())
    run, images = config.run, Images([random_pixels(config.data.crop_size)])
    processes = start(run.device, run.threads, run.dist_timeout, quiet=True)
    encoder, transform = train_byol.start(config.encoder, config.data, images, seed=0)
    method, views = BYOL(encoder, config.method), (config.view1, config.view2)
    loader = Loader.of(config, images, None, views, transform, processes)
    watch = Watch(processes, run.check_every)
    return Session(config, method, loader, transform, processes, watch)


def train(session: Session) -> Iterator[None]:
    """The loop of train_byol.py: a step for each `next`."""
    for step in session.steps():
        session.log(step)
        session.save_if_due(step)
        yield


def forward(session: Session, views: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The network's outputs for two views."""
    with session.precision.autocast():
        return session.model(*views)


def bare(session: Session, views: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """The same network on the same views at each `next`: no data, no records, no checks."""
    while True:
        outputs = forward(session, views)
        loss, _ = session.method.loss({k: v.float() for k, v in outputs.items()})
        session.precision.backward(loss)
        session.precision.step(session.optimizer)
        session.optimizer.zero_grad(set_to_none=True)
        session.method.after_step(0.5)
        yield


def alternate(sides: dict[str, Iterator], images: int, steps: int, rounds: int) -> Rows:
    """For each side its median rate, and the ratios of the first side's rates to its own.

    A side is an iterator over steps of `images` images; the first round is not counted.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            begun = time.perf_counter()
            for _ in range(steps):
                next(side)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                rates[name].append(steps * images / (time.perf_counter() - begun))
    first, *_ = rates.values()
    for name, own in rates.items():
        ratios = [a / b for a, b in zip(first, own, strict=True)]
        row = {"images/s": statistics.median(own), "ratio": statistics.median(ratios)}
        yield name, row | {"lowest": min(ratios), "highest": max(ratios)}


def count_kernels(session: Session) -> dict[str, int]:
    """How many kernels a GPU would start for the views and the forward pass, uncompiled."""
    method, cuda = copy.deepcopy(session.method), torch.device("cuda")
    images = Images([random_pixels(session.loader.crop_size)])
    with count_launches() as launches:
        method.to_empty(device=cuda)
        loader = dataclasses.replace(session.loader, images=images, device=cuda)
        launches.kernels.clear()
        views, _ = next(loader.batches(0))
        count = launches.kernels.total()
        with torch.autocast("cuda", torch.float16):  # as many as in bf16, which asks for a GPU
            method(*views)
    return {"views": count, "forward": launches.kernels.total() - count}


def profile(work) -> int:
    """How many kernels `work()` starts on this GPU; prints the 15 that take longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
    print(profiler.key_averages().table("self_device_time_total", row_limit=15))
    names = [event.name for event in profiler.events() if event.device_type.name == "CUDA"]
    return sum(not name.startswith("Mem") for name in names)  # Memcpy, Memset


def rows(flags: str, steps: int, rounds: int) -> Rows:
    """Training against the bare step and the views; the kernels of a step."""
    with build(flags) as session:
        loader, training = session.loader, train(session)
        views, _ = next(loader.batches(0))
        sides = {"training": training, "bare step": bare(session, views)}
        sides["views"] = (next(loader.batches(step)) for step in itertools.count())
        yield from alternate(sides, loader.batch_size, steps, rounds)
        yield "kernels, counted", count_kernels(session)
        if torch.cuda.is_available():
            works = {"views": lambda: next(sides["views"]), "step": lambda: next(training)}
            works["forward"] = lambda: forward(session, views)
            yield "kernels, profiled", {name: profile(work) for name, work in works.items()}


def start_up(rounds: int) -> Rows:
    """Seconds from typing a command to its first optimizer step, on the sample."""
    command, seconds = [sys.executable, "train_byol.py", "--recipe", "recipes/sample.toml"], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            out, begun = Path(folder, "run"), time.time()
            subprocess.run([*command, "--quiet", "--stop-after", "1", "--out", out], check=True)
            seconds.append((out / "metrics.jsonl").stat().st_mtime - begun)
    row = {"seconds": statistics.median(seconds), "lowest": min(seconds), "highest": max(seconds)}
    yield "first step after typing", row


def show(setting: str, rows: Rows) -> None:
    """Print each row as a line of JSON, with numbers of four digits."""
    for row, numbers in rows:
        rounded = {name: float(f"{number:.4g}") for name, number in numbers.items()}
        print(json.dumps({"setting": setting, "row": row} | rounded), flush=True)


def main(description: str, rows, *others) -> None:
    """Print the machine and the rows of each setting; without flags also those of `others`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5, help="of each side, in turn [5]")
    options, flags = parser.parse_known_args()
    device = torch.device(pick_device("auto"))
    print(f"{processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for setting, steps in ({" ".join(flags): 10} if flags else USUAL).items():
        with tempfile.TemporaryDirectory() as folder:
            show(setting, rows(f"{FLAGS} --out {folder}/run {setting}", steps, options.rounds))
    for other in () if flags else others:
        show("", other(options.rounds))


if __name__ == "__main__":
    main(__doc__, rows, start_up)
