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


class Peer:
    """BYOL out of lightly's building blocks: as many steps at a call as `ours`, the same sizes."""

    def __init__(self, ours: Training, workers: int, tuned: bool) -> None:
        torch.manual_seed(0)
        self.steps, self.tuned = ours.steps, tuned
        encoder = build_encoder(ours.session.config.encoder)
        self.online = nn.Sequential(encoder, BYOLProjectionHead(512, 1024, 256))
        self.target = copy.deepcopy(self.online)
        deactivate_requires_grad(self.target)
        self.predictor = BYOLPredictionHead(256, 1024, 256)
        learner = nn.Sequential(self.online, self.predictor)
        if tuned:
            learner.to(memory_format=torch.channels_last)
            self.target.to(memory_format=torch.channels_last)
        self.criterion = NegativeCosineSimilarity()
        self.optimizer = torch.optim.SGD(learner.parameters(), lr=0.06)
        size = ours.pixels.shape[-1]
        views = BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size)
        loader = DataLoader(
            [Image.fromarray(x) for x in ours.pixels.transpose(0, 2, 3, 1)],
            ours.batch,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,  # a fork shares pages
            persistent_workers=workers > 0,
            collate_fn=functools.partial(make_views, BYOLTransform(*views)),
        )
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def __call__(self) -> None:
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


def rows(ours: Training, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Ours against lightly as it stands and against the tuned one, by workers."""
    sides = {"ours": ours}
    for workers in (0, 1, 2):
        sides[f"lightly, {workers} workers"] = Peer(ours, workers, tuned=False)
        sides[f"lightly bf16, {workers} workers"] = Peer(ours, workers, tuned=True)
    return alternate(sides, ours.steps * ours.batch, rounds)


if __name__ == "__main__":
    main(__doc__, rows)
