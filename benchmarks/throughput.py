"""How near training is to the limit of this machine: `python -m benchmarks.throughput`.

Prints JSON, a line a row: training; the same with its images in main memory; the bare step of the
same network (fixed views, no records, no checks); the views alone; what one step starts on the
device.  `ratio` is the first row's rate through this one's.  They run in turn, A B A B; on a shared
machine only their ratio means something.  Flags of train_byol.py, such as `--crop-size 32
--batch-size 1024 --compile`, take the place of the two usual settings.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

import train_byol
from byol.byol import BYOL
from core.device import pick_device
from data.images import Images
from data.loader import Loader
from reproduce import processor
from training.distributed import start
from training.session import Session
from training.stopping import Watch

USUAL = ("--crop-size 96 --batch-size 64", "--crop-size 32 --batch-size 128 --stem small")
FLAGS = "--optimizer sgd --byol.hidden 1024 --steps 100000 --quiet"


class Training:
    """BYOL as train_byol.py trains it, on random images; its bare step; its views.

    Each runs `steps` steps at a call, which take about `images` images.
    """

    def __init__(self, flags: str, images: int, out: str) -> None:
        config = train_byol.configure(f"{FLAGS} --out {out} {flags}".split())
        run, side, self.batch = config.run, config.data.crop_size, config.optim.batch_size
        self.steps = max(1, images // self.batch)
        self.pixels = np.random.default_rng(0).integers(0, 256, (4096, 3, side, side), np.uint8)
        self.images = Images([self.pixels])
        processes = start(run.device, run.threads, run.dist_timeout, quiet=True)
        encoder, transform = train_byol.start(config.encoder, config.data, self.images, seed=0)
        method, views = BYOL(encoder, config.method), (config.view1, config.view2)
        self.loader = Loader.of(config, self.images, None, views, transform, processes)
        self.resident = self.loader.images
        watch = Watch(processes, run.check_every)
        self.session = Session(config, method, self.loader, transform, processes, watch)
        self.iterator = self.session.steps()
        self.fixed_views, _ = next(self.loader.batches(0))

    def __call__(self, images: Images | None = None) -> None:
        """Steps of the loop of train_byol.py, from its images or from others."""
        self.loader.images = images or self.resident
        for _ in range(self.steps):
            step = next(self.iterator)
            self.session.log(step)
            self.session.save_if_due(step)

    def bare(self) -> None:
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

    def views(self) -> None:
        """What the loader does for these steps."""
        for step in range(self.steps):
            next(self.loader.batches(step))


def alternate(
    sides: dict[str, Callable], images: int, rounds: int
) -> Iterator[tuple[str, dict[str, float]]]:
    """For each side its median rate, and the ratios of the first side's rates to its own.

    A side is a function that works off `images` images; the first round is not counted.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            begun = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                rates[name].append(images / (time.perf_counter() - begun))
    first, *_ = rates.values()
    for name, own in rates.items():
        ratios = [a / b for a, b in zip(first, own, strict=True)]
        row = {"images/s": statistics.median(own), "ratio": statistics.median(ratios)}
        yield name, row | {"lowest": min(ratios), "highest": max(ratios)}


def profile(work: Callable) -> dict[str, float]:
    """How many kernels and copies `work` starts on the GPU; prints the 15 that take longest.

    Without a GPU: the same of torch's operators.
    """
    kind = "CUDA" if torch.cuda.is_available() else "CPU"
    activity = getattr(torch.profiler.ProfilerActivity, kind)
    with torch.profiler.profile(activities=[activity]) as profiler:
        work()
    order = f"self_{kind.lower()}_time_total"
    print(profiler.key_averages().table(order, row_limit=15, max_name_column_width=60))
    return {"launches": sum(event.device_type.name == kind for event in profiler.events())}


def rows(ours: Training, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Training against the bare step and the views; the launches of one step."""
    sides = {"training": ours, "images in main memory": lambda: ours(ours.images)}
    sides |= {"bare step": ours.bare, "views": ours.views}
    yield from alternate(sides, ours.steps * ours.batch, rounds)
    ours.steps = 1
    yield "a step", profile(ours)


def main(description: str, rows: Callable) -> None:
    """Print the machine, and the rows of each setting."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5, help="of each side, in turn [5]")
    parser.add_argument("--images", type=int, default=640, help="of a side in a round [640]")
    options, flags = parser.parse_known_args()
    device = torch.device(pick_device("auto"))
    print(f"{processor(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for setting in [" ".join(flags)] if flags else USUAL:
        with tempfile.TemporaryDirectory() as folder:
            ours = Training(setting, options.images, f"{folder}/run")
            for what, numbers in rows(ours, options.rounds):
                rounded = {name: float(f"{number:.4g}") for name, number in numbers.items()}
                print(json.dumps({"setting": setting, "row": what} | rounded), flush=True)
            ours.session.close()


if __name__ == "__main__":
    main(__doc__, rows)
