"""How near training is to the limit of this machine: `python -m benchmarks.throughput`.

Prints a line of JSON for training, for the bare step of the same network (fixed views, no log, no
checks), and for the views alone.  They run in turn, A B A B; `ratio` is training's rate through the
line's rate, and on a shared machine only ratios mean something.  Then, on a GPU alone, the kernels
that a step starts; and the seconds from typing a command to its first step.
With --lightly, the other lines are lightly's published BYOL example on the same network, batch size
and images, on the CPU; `pip install -r benchmarks/requirements.txt` first.
Flags of train_byol.py, such as `--crop-size 32 --compile`, replace the usual settings.
"""

import argparse
import copy
import functools
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
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, default_collate
from torchvision.transforms.functional import to_pil_image

import train_byol
from byol.byol import BYOL
from data.images import Images
from data.loader import Loader
from reproduce import processor
from training.distributed import start
from training.encoder import build_encoder
from training.run_folder import git_commit
from training.session import Session
from training.stopping import Watch

FLAGS = "--optimizer sgd --byol.hidden 1024 --steps 100000 --quiet"
SETTINGS = ["--crop-size 96 --batch-size 64", "--crop-size 32 --batch-size 128 --stem small"]


def start_training(setting: str, out: str) -> Session:
    """A run of train_byol.py on 1,024 random images."""
    config = train_byol.configure([*f"{FLAGS} {setting}".split(), "--out", out])
    run, size = config.run, config.data.crop_size
    rng = np.random.default_rng(0)
    images = Images([rng.integers(0, 256, (1024, 3, size, size), np.uint8)])
    processes = start(run.device, run.threads, run.dist_timeout, quiet=True)
    encoder, transform = train_byol.start(config.encoder, config.data, images, seed=0)
    method, views = BYOL(encoder, config.method), (config.view1, config.view2)
    loader = Loader.of(config, images, None, views, transform, processes)
    return Session(config, method, loader, transform, processes, Watch(processes))


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
        session.precision.scaler.scale(loss).backward()
        session.precision.step(session.optimizer)
        session.optimizer.zero_grad(set_to_none=True)
        session.method.after_step(0.5)
        del outputs, loss  # or --compile would record its graphs twice
        yield


def make_views(transform: Callable, images: list) -> list[torch.Tensor]:
    """A batch of each view, as a DataLoader makes it of a data set with this transform."""
    return default_collate([transform(image) for image in images])


def train_lightly(session: Session, workers: int, tuned: bool) -> Iterator[None]:
    """lightly's example, with its views, heads, loss and moving average: a step for each `next`.

    tuned   with bf16 autocast and channels-last memory, the two lines that most users would add
    """
    from lightly.loss import NegativeCosineSimilarity  # not in requirements.txt
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum
    from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform

    size, batch_size = session.loader.crop_size, session.loader.batch_size
    images = [to_pil_image(pixels) for pixels in session.loader.images.take(np.arange(1024))]
    views = BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size)
    collate = functools.partial(make_views, BYOLTransform(*views))
    loader = DataLoader(images * 1000, batch_size, num_workers=workers, collate_fn=collate)
    layout = torch.channels_last if tuned else torch.contiguous_format
    encoder = build_encoder(session.config.encoder)
    online = nn.Sequential(encoder, BYOLProjectionHead(encoder.feature_size, 1024, 256))
    online.to(memory_format=layout)
    target = copy.deepcopy(online).requires_grad_(False)
    predictor = BYOLPredictionHead(256, 1024, 256)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD([*online.parameters(), *predictor.parameters()], lr=0.06)
    for batch in loader:
        update_momentum(online, target, m=0.99)
        x0, x1 = (x.contiguous(memory_format=layout) for x in batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=tuned):
            p0, p1 = (predictor(online(x)) for x in (x0, x1))
            z0, z1 = (target(x).detach() for x in (x0, x1))
            loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
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
        show(name, row | {"lowest": min(ratios), "highest": max(ratios)})


def show(name: str, numbers: dict[str, float]) -> None:
    """Print a line of JSON, each number to four digits."""
    rounded = {key: float(f"{number:.4g}") for key, number in numbers.items()}
    print(json.dumps({"row": name} | rounded), flush=True)


def profile(training: Iterator) -> int:
    """How many kernels a step starts on this GPU, but for CUDA graphs; prints the longest."""
    with torch.profiler.profile() as profiler:
        next(training)
    events = profiler.key_averages()
    print(events.table("self_device_time_total", row_limit=15))
    return sum(event.count for event in events if "LaunchKernel" in event.key)


def time_start(folder: str) -> float:
    """Seconds from typing a command to its first optimizer step, on the sample."""
    flags = "--recipe recipes/sample.toml --quiet --stop-after 1 --out".split()
    begun = time.time()
    command = [sys.executable, "train_byol.py", *flags, f"{folder}/first"]
    subprocess.run(command, check=True)
    return os.path.getmtime(f"{folder}/first/metrics.jsonl") - begun


def measure(session: Session, rounds: int) -> None:
    """Print the lines of one setting."""
    training, loader = train(session), session.loader
    views = (next(loader.batches(step)) for step in range(10**6))
    sides = {"training": training, "bare step": train_bare(session), "views": views}
    alternate(sides, loader.batch_size, rounds)
    if torch.cuda.is_available():
        show("kernels of a step", {"kernels": profile(training)})
    show("first step after typing", {"seconds": time_start(session.folder.out)})


def measure_lightly(session: Session, rounds: int) -> None:
    """Print our rate and lightly's: as published and tuned, each with 0, 1 and 2 workers."""
    sides = {"training": train(session)}
    for workers in (0, 1, 2):
        sides[f"lightly, {workers} workers"] = train_lightly(session, workers, False)
        sides[f"lightly bf16, {workers} workers"] = train_lightly(session, workers, True)
    alternate(sides, session.loader.batch_size, rounds)


def main() -> None:
    """Measure each setting, after a line that names machine and commit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each side, in turn [5]")
    parser.add_argument("--lightly", action="store_true", help="compare with lightly")
    args, flags = parser.parse_known_args()
    for setting in [" ".join(flags)] if flags else SETTINGS:
        if args.lightly:
            setting += " --device cpu"
        with tempfile.TemporaryDirectory() as out, start_training(setting, f"{out}/run") as session:
            machine = processor(session.processes.device)
            about = {"machine": machine, "torch": torch.__version__, "commit": git_commit()}
            print(json.dumps(about | {"setting": setting}), flush=True)
            run = measure_lightly if args.lightly else measure
            run(session, args.rounds)


if __name__ == "__main__":
    main()
