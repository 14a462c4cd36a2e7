"""The same work by lightly: `python -m benchmarks.peers`, after benchmarks/requirements.txt.

lightly's side follows its published BYOL example: its heads, transform, loss and moving average,
SGD, a DataLoader; images come from memory as PIL images.  It runs as it stands, and with bf16
autocast and channels-last memory, the two lines that most users would add.  Network, batch and
images are the same on both sides, each in a process of its own on the CPU.  Prints JSON, as
benchmarks.throughput does, and takes the same flags.
"""

import copy
import functools
import itertools
import multiprocessing
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

from benchmarks.throughput import Rows, alternate, build, main, random_pixels, train
from train_byol import configure
from training.encoder import build_encoder


def make_views(transform: Callable, images: list[Image.Image]) -> list[torch.Tensor]:
    """A batch of each view: what a data set and lightly's transform give to a DataLoader."""
    return default_collate([transform(image) for image in images])


def peer(flags: str, workers: int, tuned: bool) -> Iterator[None]:
    """BYOL out of lightly's building blocks: a step for each `next`."""
    torch.manual_seed(0)
    config = configure(flags.split())
    size, encoder = config.data.crop_size, build_encoder(config.encoder)
    online = nn.Sequential(encoder, BYOLProjectionHead(encoder.feature_size, 1024, 256))
    target = copy.deepcopy(online)
    deactivate_requires_grad(target)
    predictor = BYOLPredictionHead(256, 1024, 256)
    learner = nn.Sequential(online, predictor)
    layout = torch.channels_last if tuned else torch.contiguous_format
    learner.to(memory_format=layout)
    target.to(memory_format=layout)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.06)
    views = BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size)
    loader = DataLoader(
        [Image.fromarray(pixels) for pixels in random_pixels(size).transpose(0, 2, 3, 1)],
        config.optim.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=functools.partial(make_views, BYOLTransform(*views)),
    )
    for batch in itertools.chain.from_iterable(itertools.repeat(loader)):
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


def ours(flags: str) -> Iterator[None]:
    """Our training: a step for each `next`."""
    return train(build(flags))


side = functools.cache(lambda make, *arguments: make(*arguments))  # once in a process


def work(make: Callable[..., Iterator], *arguments) -> None:
    """In a side's process: a step; the first call makes the side."""
    next(side(make, *arguments))


def apart(make: Callable[..., Iterator], *arguments) -> Iterator[None]:
    """A side in a process of its own, as a user runs it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        while True:
            yield pool.submit(work, make, *arguments).result()


def rows(flags: str, steps: int, rounds: int) -> Rows:
    """Ours against lightly as it stands and against the tuned one, by workers."""
    flags += " --device cpu"
    sides = {"ours": apart(ours, flags)}
    for workers in (0, 1, 2):
        sides[f"lightly, {workers} workers"] = apart(peer, flags, workers, False)
        sides[f"lightly bf16, {workers} workers"] = apart(peer, flags, workers, True)
    return alternate(sides, configure(flags.split()).optim.batch_size, steps, rounds)


if __name__ == "__main__":
    main(__doc__, rows)
