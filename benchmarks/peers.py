"""The same work by lightly: `python -m benchmarks.peers`, after benchmarks/requirements.txt.

lightly's side follows its published BYOL example: torchvision's ResNet-18, its heads, transform,
loss and moving average, SGD, a DataLoader; images come from memory as PIL images.  It runs as it
stands, and with bf16 autocast and channels-last memory, the two lines that most users would add.
Same network, heads, batch and images on both sides.
"""

import copy
import itertools
import statistics
import sys
import tempfile

import torch
import torchvision
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

from benchmarks import timing
from benchmarks.throughput import MEAN, SIZES, STD, Training, photographs
from data.loader import generator
from data.views import View2Config, ViewConfig, apply, draw, normalise


class Pictures(Dataset):
    """PIL images in memory under lightly's transform."""

    def __init__(self, images: list, transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(self.images[index])


def pictures(count: int, side: int) -> list:
    """The same photographs as our side gets, as PIL images."""
    return [Image.fromarray(a) for a in photographs(count, side).transpose(0, 2, 3, 1)]


def transform(side: int) -> BYOLTransform:
    """Its two views at `side` pixels."""
    return BYOLTransform(BYOLView1Transform(input_size=side), BYOLView2Transform(input_size=side))


class Lightly(nn.Module):
    """Its building blocks around a backbone that gives `features` numbers; both heads alike."""

    def __init__(self, backbone: nn.Module, features=512, hidden=1024, projection=256) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(features, hidden, projection)
        self.prediction_head = BYOLPredictionHead(projection, hidden, projection)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def forward_momentum(self, x):
        y = self.backbone_momentum(x).flatten(start_dim=1)
        return self.projection_head_momentum(y).detach()


class Peer:
    """Its training loop, `steps` steps at a call."""

    def __init__(self, side: int, images: int, steps: int, workers: int, tuned: bool) -> None:
        torch.manual_seed(0)
        self.batch, self.steps, self.tuned = SIZES[side][0], steps, tuned
        net = torchvision.models.resnet18()
        self.model = Lightly(nn.Sequential(*list(net.children())[:-1]))
        if tuned:
            self.model.to(memory_format=torch.channels_last)
        self.criterion = NegativeCosineSimilarity()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.06)
        self.loader = DataLoader(
            Pictures(pictures(images, side), transform(side)), batch_size=self.batch,
            shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0,
        )  # fmt: skip
        self.batches = itertools.chain.from_iterable(itertools.repeat(self.loader))

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


def training(options):
    """Ours against lightly as it stands (best number of workers), and against the tuned one."""
    for side in SIZES:
        steps = 1 if options.tiny else 320 // side
        images = 256 if options.tiny else 1024
        with tempfile.TemporaryDirectory() as folder:
            sides = {"ours": timing.Apart(Training, side, images, f"{folder}/run", steps)}
            for workers in (0,) if options.tiny else (0, 1, 2):
                for kind, tuned in (("lightly", False), ("lightly bf16", True)):
                    peer = timing.Apart(Peer, side, images, steps, workers, tuned)
                    sides[f"{kind}, {workers} workers"] = peer
            rates = timing.alternate(sides, options.rounds)
            for process in sides.values():
                process.close()
        for kind in ("lightly, ", "lightly bf16, "):
            best = max(
                (n for n in rates if n.startswith(kind)), key=lambda n: statistics.median(rates[n])
            )
            yield timing.row(f"training / {kind}{side} px", rates, "ours", best)


def views(options):
    """Both views of an image as specified, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for side in SIZES:
        count = 64 if options.tiny else 512
        images, view = pictures(count, side), transform(side)
        pixels = torch.from_numpy(photographs(count, side))
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        rng = generator(0, 2, 0)

        def ours(side=side, pixels=pixels, rng=rng, mean=mean, std=std) -> int:
            for block in pixels.split(SIZES[side][0]):
                for config in (ViewConfig(), View2Config()):
                    drawn = draw(config, len(block), side, side, rng)
                    normalise(apply(block, config, drawn, side), mean, std)
            return len(pixels)

        def theirs(images=images, view=view) -> int:
            for image in images:
                view(image)
            return len(images)

        rates = timing.alternate({"ours": ours, "lightly": theirs}, options.rounds)
        yield timing.row(f"views / lightly, {side} px, one thread", rates, "ours", "lightly")
    torch.set_num_threads(threads)


def memory(options):
    """Peak memory of a training run at 96 px, all processes; lightly's example has 8 workers."""
    tiny = ["--tiny"] * options.tiny
    python = [sys.executable, "-m"]
    ours = timing.peak_memory([*python, "benchmarks.throughput", "--peak", *tiny])
    for workers in (8, 0):
        words = [*python, "benchmarks.peers", "--peak", str(workers), *tiny]
        theirs = timing.peak_memory(words)
        yield {"what": f"peak memory / lightly's with {workers} workers, MiB", "ours": ours,
               "lightly": theirs, "ratio": ours / theirs}  # fmt: skip


ROWS = {"training": training, "views": views, "memory": memory}

if __name__ == "__main__":
    if "--peak" in sys.argv:
        workers = int(sys.argv[sys.argv.index("--peak") + 1])
        Peer(96, 1024, 10, workers, tuned=False)()
    else:
        timing.main(__doc__, ROWS)
