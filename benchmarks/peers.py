"""The same work by lightly: `python -m benchmarks.peers`, after benchmarks/requirements.txt.

lightly's side follows its published BYOL example: its heads, transform, loss and moving average,
SGD, a DataLoader; images come from memory as PIL images.  It runs as it stands, and with bf16
autocast and channels-last memory, the two lines that most users would add.  Network, batch and
images are the same on both sides, each in a process of its own.
"""

import contextlib
import copy
import functools
import itertools
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, default_collate

from benchmarks.throughput import SIZES, Training, alternate, compare, main, random_images
from training.encoder import Encoder


def make_views(transform: Callable, images: list[Image.Image]) -> list[torch.Tensor]:
    """A batch of each view: what a data set and lightly's transform give to a DataLoader."""
    return default_collate([transform(image) for image in images])


class Peer:
    """BYOL out of lightly's building blocks, `steps` steps at a call; returns how many images."""

    def __init__(self, side: int, steps: int, workers: int, tuned: bool) -> None:
        torch.manual_seed(0)
        (self.batch, stem), self.steps, self.tuned = SIZES[side], steps, tuned
        self.online = nn.Sequential(Encoder("resnet18", stem), BYOLProjectionHead(512, 1024, 256))
        self.target = copy.deepcopy(self.online)
        deactivate_requires_grad(self.target)
        self.predictor = BYOLPredictionHead(256, 1024, 256)
        learner = nn.Sequential(self.online, self.predictor)
        if tuned:
            learner.to(memory_format=torch.channels_last)
            self.target.to(memory_format=torch.channels_last)
        self.criterion = NegativeCosineSimilarity()
        self.optimizer = torch.optim.SGD(learner.parameters(), lr=0.06)
        images = [Image.fromarray(x) for x in random_images(side).transpose(0, 2, 3, 1)]
        views = BYOLView1Transform(input_size=side), BYOLView2Transform(input_size=side)
        loader = DataLoader(
            images,
            self.batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=functools.partial(make_views, BYOLTransform(*views)),
        )
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def __call__(self) -> int:
        for x0, x1 in itertools.islice(self.batches, self.steps):
            update_momentum(self.online, self.target, m=0.99)
            if self.tuned:
                x0, x1 = (x.contiguous(memory_format=torch.channels_last) for x in (x0, x1))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.tuned):
                p0, p1 = (self.predictor(self.online(x)) for x in (x0, x1))
                z0, z1 = (self.target(x).detach() for x in (x0, x1))
                loss = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.steps * self.batch


@functools.cache
def made(make: Callable, *arguments) -> Callable[[], int]:
    """make(*arguments), once in a process."""
    return make(*arguments)


def work(make: Callable, *arguments) -> int:
    """In a side's process: some steps; the first call, which is not counted, makes the side."""
    return made(make, *arguments)()


def apart(pools: contextlib.ExitStack, make: Callable, *arguments) -> Callable[[], int]:
    """A side in a process of its own, as a user runs it."""
    pool = pools.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
    return lambda: pool.submit(work, make, *arguments).result()


def training(options) -> Iterator[tuple[str, dict[str, float]]]:
    """Ours against lightly as it stands and against the tuned one, with its best workers."""
    for side in SIZES:
        steps = 1 if options.tiny else 320 // side
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as pools:
            sides = {"ours": apart(pools, Training, side, steps, f"{folder}/run", "cpu")}
            for workers in (0,) if options.tiny else (0, 1, 2):
                for kind, tuned in (("lightly", False), ("lightly bf16", True)):
                    peer = apart(pools, Peer, side, steps, workers, tuned)
                    sides[f"{kind}, {workers} workers"] = peer
            rates = alternate(sides, options.rounds)
        for kind in ("lightly, ", "lightly bf16, "):
            medians = {n: statistics.median(r) for n, r in rates.items() if n.startswith(kind)}
            best = max(medians, key=medians.get)
            yield f"training / {kind}{side} px", compare(rates, "ours", best)


if __name__ == "__main__":
    main(__doc__, training)
