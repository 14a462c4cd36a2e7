"""How near training is to the limit of this machine: `python -m benchmarks.throughput`.

Prints a line of JSON for training, for the bare step of the same network (fixed views, no log, no
checks), and for the views alone.  They run in turn, A B A B; `ratio` is training's rate through the
line's rate, and on a shared machine only ratios mean something.  Then the number of kernels that a
step starts on a GPU, and the seconds from typing a command to its first step.
Flags of train_byol.py, such as `--crop-size 32 --compile`, replace the usual settings.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import torch
from torch.utils.benchmark import Timer

import train_byol
from benchmarks.launches import count_launches
from byol.byol import BYOL
from data.images import Images
from data.loader import Loader
from reproduce import processor
from training.distributed import start
from training.session import Session
from training.stopping import Watch

FLAGS = "--optimizer sgd --byol.hidden 1024 --steps 100000 --quiet"
SETTINGS = ["--crop-size 96 --batch-size 64", "--crop-size 32 --batch-size 128 --stem small"]


def random_pixels(size: int) -> np.ndarray:
    """1,024 images as uint8 (1024, 3, size, size), the same at each call."""
    return np.random.default_rng(0).integers(0, 256, (1024, 3, size, size), np.uint8)


@contextlib.contextmanager
def start_training(setting: str) -> Iterator[Session]:
    """Context with a run of train_byol.py on random images; prints machine and setting."""
    with tempfile.TemporaryDirectory() as folder:
        config = train_byol.configure(f"{FLAGS} --out {folder}/run {setting}".split())
        run, images = config.run, Images([random_pixels(config.data.crop_size)])
        processes = start(run.device, run.threads, run.dist_timeout, quiet=True)
        print(f"{processor(processes.device)}, torch {torch.__version__}: {setting}", flush=True)
        encoder, transform = train_byol.start(config.encoder, config.data, images, seed=0)
        method, views = BYOL(encoder, config.method), (config.view1, config.view2)
        loader = Loader.of(config, images, None, views, transform, processes)
        with Session(config, method, loader, transform, processes, Watch(processes)) as session:
            yield session


def train(session: Session) -> Iterator[None]:
    """The loop of train_byol.py: a step for each `next`."""
    for step in session.steps():
        session.log(step)
        session.save_if_due(step)
        yield


def train_bare(session: Session) -> Iterator[None]:
    """The same network on the same views in each step, without log, saves or checks."""
    views, _ = next(session.loader.batches(0))
    while True:
        with session.precision.autocast():
            outputs = session.model(*views)
        loss, _ = session.method.loss({k: v.float() for k, v in outputs.items()})
        session.precision.backward(loss)
        session.precision.step(session.optimizer)
        session.optimizer.zero_grad(set_to_none=True)
        session.method.after_step(0.5)
        yield


def alternate(sides: dict[str, Iterator], batch_size: int, rounds: int) -> None:
    """Print the median rate of each side, and the ratios of the first side's rates to its rates.

    A side is an iterator over training steps: two are not timed, then ten are, in each round.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            threads = torch.get_num_threads()
            timer = Timer("next(side)", globals={"side": side}, num_threads=threads)
            times[name].append(timer.timeit(10).mean)
    first = next(iter(times.values()))
    for name, seconds in times.items():
        ratios = [b / a for a, b in zip(first, seconds, strict=True)]
        rate = 1 / median(seconds)
        row = {"images/s": batch_size * rate, "steps/s": rate, "ratio": median(ratios)}
        row |= {"lowest": min(ratios), "highest": max(ratios)}
        row = {key: float(f"{number:.4g}") for key, number in row.items()}
        print(json.dumps({"row": name} | row), flush=True)


def count_kernels(session: Session) -> dict[str, int]:
    """How many kernels a GPU would start for the views, and for the forward pass in float32."""
    method, cuda = copy.deepcopy(session.method), torch.device("cuda")
    with count_launches() as launches:
        views, _ = next(dataclasses.replace(session.loader, device=cuda).batches(0))
        of_views = launches.kernels.total()
        method.to_empty(device=cuda)(*views)
    return {"views": of_views, "forward": launches.kernels.total() - of_views}


def profile(training: Iterator) -> int:
    """How many kernels a step starts on this GPU; prints the 15 that take longest."""
    with torch.profiler.profile() as profiler:
        next(training)
    events = profiler.key_averages()
    print(events.table("self_device_time_total", row_limit=15))
    return sum(event.count for event in events if "LaunchKernel" in event.key)


def time_start(folder: str) -> float:
    """Seconds from typing a command to its first optimizer step, on the sample."""
    flags = f"--recipe recipes/sample.toml --quiet --stop-after 1 --out {folder}/first"
    begun = time.time()
    subprocess.run([sys.executable, "train_byol.py", *flags.split()], check=True)
    return os.path.getmtime(f"{folder}/first/metrics.jsonl") - begun


def measure(setting: str, rounds: int) -> None:
    """Print the rows of one setting."""
    with start_training(setting) as session:
        loader, training = session.loader, train(session)
        views = (next(loader.batches(step)) for step in range(10**6))
        sides = {"training": training, "bare step": train_bare(session), "views": views}
        alternate(sides, loader.batch_size, rounds)
        on_gpu = torch.cuda.is_available()
        kernels = {"profiled": profile(training)} if on_gpu else count_kernels(session)
        print(json.dumps({"row": "kernels of a step"} | kernels), flush=True)
        seconds = time_start(session.folder.out)
        print(
            json.dumps({"row": "first step after typing", "seconds": round(seconds, 2)}), flush=True
        )


def main(description: str, measure: Callable[[str, int], None]) -> None:
    """Call `measure` with each setting, which are flags of train_byol.py, and --rounds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5, help="of each side, in turn [5]")
    args, flags = parser.parse_known_args()
    for setting in [" ".join(flags)] if flags else SETTINGS:
        measure(setting, args.rounds)


if __name__ == "__main__":
    main(__doc__, measure)
