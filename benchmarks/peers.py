"""The same work by lightly: `python -m benchmarks.peers`, after benchmarks/requirements.txt.

lightly's side follows its published BYOL example: its heads, transform, loss and moving average,
SGD, a DataLoader; images come from memory as PIL images.  It runs as it stands, and with bf16
autocast and channels-last memory, the two lines that most users would add.  Network, batch and
images are the same on both sides.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, default_collate

from benchmarks.throughput import Training, alternate, main
from training.encoder import build_encoder


def make_views(transform: Callable, images: list[Image.Image]) -> list[torch.Tensor]:
    """A batch of each view: what a data set and lightly's transform give to a DataLoader."""
    return default_collate([transform(image) for image in images])


def peer(ours: Training, workers: int, tuned: bool) -> Iterator[None]:
    """BYOL out of lightly's building blocks, with our sizes: `ours.steps` steps for each `next`."""
    torch.manual_seed(0)
    encoder = build_encoder(ours.session.config.encoder)
    online = nn.Sequential(encoder, BYOLProjectionHead(512, 1024, 256))
    target = copy.deepcopy(online)
    deactivate_requires_grad(target)
    predictor = BYOLPredictionHead(256, 1024, 256)
    learner = nn.Sequential(online, predictor)
    layout = torch.channels_last if tuned else torch.contiguous_format
    learner.to(memory_format=layout)
    target.to(memory_format=layout)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.06)
    size = ours.pixels.shape[-1]
    views = BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size)
    loader = DataLoader(
        [Image.fromarray(x) for x in ours.pixels.transpose(0, 2, 3, 1)],
        ours.batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # forks slow the main process down
        persistent_workers=workers > 0,
        collate_fn=functools.partial(make_views, BYOLTransform(*views)),
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for number, batch in enumerate(batches, 1):
        update_momentum(online, target, m=0.99)
        x0, x1 = (x.contiguous(memory_format=layout) for x in batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=tuned):
            p0, p1 = (predictor(online(x)) for x in (x0, x1))
            z0, z1 = (target(x).detach() for x in (x0, x1))
            loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % ours.steps == 0:
            yield


def rows(ours: Training, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Ours against lightly as it stands and against the tuned one, by workers."""
    sides = {"ours": ours}
    for workers in (0, 1, 2):
        for name, tuned in (("lightly", False), ("lightly bf16", True)):
            side = functools.partial(next, peer(ours, workers, tuned))
            sides[f"{name}, {workers} workers"] = side
    return alternate(sides, ours.steps * ours.batch, rounds)


if __name__ == "__main__":
    main(__doc__, rows)
