"""The same work by lightly: `python -m benchmarks.peers`, after benchmarks/requirements.txt.

lightly's side follows its published BYOL example: its heads, transform, loss and moving average,
SGD, a DataLoader; images come from memory as PIL images.  It runs as it stands, and with bf16
autocast and channels-last memory, the two lines that most users would add.  Network, batch and
images are the same on both sides, each in a process of its own.
"""

import copy
import itertools
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.byol_transform import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.throughput import SIZES, Training, alternate, main, photographs, row
from training.encoder import Encoder


class Pictures(Dataset):
    """PIL images in memory under lightly's transform."""

    def __init__(self, count: int, side: int) -> None:
        pixels = photographs(count, side).transpose(0, 2, 3, 1)
        self.images = [Image.fromarray(image) for image in pixels]
        views = BYOLView1Transform(input_size=side), BYOLView2Transform(input_size=side)
        self.transform = BYOLTransform(*views)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(self.images[index])


class Lightly(nn.Module):
    """BYOL out of lightly's building blocks."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(512, 1024, 256)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x)))

    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x)).detach()


class Peer:
    """Its training loop, `steps` steps at a call."""

    def __init__(self, side: int, images: int, steps: int, workers: int, tuned: bool) -> None:
        torch.manual_seed(0)
        (self.batch, stem), self.steps, self.tuned = SIZES[side], steps, tuned
        self.model = Lightly(Encoder("resnet18", stem))
        if tuned:
            self.model.to(memory_format=torch.channels_last)
        self.criterion = NegativeCosineSimilarity()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.06)
        loader = DataLoader(Pictures(images, side), self.batch, shuffle=True, drop_last=True,
                            num_workers=workers, persistent_workers=workers > 0)  # fmt: skip
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def __call__(self) -> int:
        m = self.model
        for x0, x1 in itertools.islice(self.batches, self.steps):
            update_momentum(m.backbone, m.backbone_momentum, m=0.99)
            update_momentum(m.projection_head, m.projection_head_momentum, m=0.99)
            if self.tuned:
                x0, x1 = (x.contiguous(memory_format=torch.channels_last) for x in (x0, x1))
            with torch.autocast("cpu", torch.bfloat16, enabled=self.tuned):
                p0, z0, p1, z1 = m(x0), m.forward_momentum(x0), m(x1), m.forward_momentum(x1)
                loss = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.steps * self.batch


class Apart:
    """A side in a process of its own, as a user runs it; `make(*arguments)` builds it there."""

    def __init__(self, make: Callable, *arguments) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments))
        self.process.start()

    def __call__(self) -> int:
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self) -> None:
        """End its process."""
        self.pipe.send(False)
        self.process.join()


def _serve(pipe, make: Callable, arguments: tuple) -> None:
    side = make(*arguments)
    while pipe.recv():
        pipe.send(side())


def training(options):
    """Ours against lightly as it stands and against the tuned one, with its best workers."""
    for side in SIZES:
        steps, images = (1, 256) if options.tiny else (320 // side, 1024)
        with tempfile.TemporaryDirectory() as folder:
            sides = {"ours": Apart(Training, side, images, f"{folder}/run", steps)}
            for workers in (0,) if options.tiny else (0, 1, 2):
                for kind, tuned in (("lightly", False), ("lightly bf16", True)):
                    peer = Apart(Peer, side, images, steps, workers, tuned)
                    sides[f"{kind}, {workers} workers"] = peer
            rates = alternate(sides, options.rounds)
            for side_of_row in sides.values():
                side_of_row.close()
        for kind in ("lightly, ", "lightly bf16, "):
            medians = {n: statistics.median(r) for n, r in rates.items() if n.startswith(kind)}
            best = max(medians, key=medians.get)
            yield row(f"training / {kind}{side} px", rates, "ours", best)


if __name__ == "__main__":
    main(__doc__, {"training": training})
