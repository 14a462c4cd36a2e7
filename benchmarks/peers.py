"""The same work by lightly: `python -m benchmarks.peers`, after benchmarks/requirements.txt.

lightly's side is its published BYOL example: its heads, transform, loss and moving average, SGD, a
DataLoader; images come from memory.  It runs as published, and with bf16 autocast and channels-last
memory, the two lines that most users would add.  Network, batch and images are the same on both
sides.  Prints JSON and takes flags as benchmarks.throughput does.
"""

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import update_momentum
from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, default_collate

from benchmarks.throughput import alternate, main, random_pixels, start_training, train
from train_byol import configure
from training.encoder import build_encoder


def make_views(transform: Callable, images: list[Image.Image]) -> list[torch.Tensor]:
    """A batch of each view, as a DataLoader makes it of a data set with this transform."""
    return default_collate([transform(image) for image in images])


def train_lightly(setting: str, workers: int, tuned: bool) -> Iterator[None]:
    """BYOL out of lightly's building blocks: a step for each `next`."""
    config = configure(setting.split())
    size, encoder = config.data.crop_size, build_encoder(config.encoder)
    layout = torch.channels_last if tuned else torch.contiguous_format
    online = nn.Sequential(encoder, BYOLProjectionHead(encoder.feature_size, 1024, 256))
    online.to(memory_format=layout)
    target = copy.deepcopy(online).requires_grad_(False)
    predictor = BYOLPredictionHead(256, 1024, 256)
    criterion = NegativeCosineSimilarity()
    optimizer = torch.optim.SGD([*online.parameters(), *predictor.parameters()], lr=0.06)
    views = BYOLView1Transform(input_size=size), BYOLView2Transform(input_size=size)
    images = [Image.fromarray(pixels) for pixels in random_pixels(size).transpose(0, 2, 3, 1)]
    loader = DataLoader(
        images,
        config.optim.batch_size,
        sampler=RandomSampler(images, replacement=True, num_samples=10**9),
        num_workers=workers,
        collate_fn=functools.partial(make_views, BYOLTransform(*views)),
    )
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


def measure(setting: str, rounds: int) -> None:
    """Print our rate and lightly's: as published and tuned, each with 0, 1 and 2 workers."""
    setting += " --device cpu"
    with start_training(setting) as session:
        sides = {"training": train(session)}
        for workers in (0, 1, 2):
            sides[f"lightly, {workers} workers"] = train_lightly(setting, workers, False)
            sides[f"lightly bf16, {workers} workers"] = train_lightly(setting, workers, True)
        alternate(sides, session.loader.batch_size, rounds)


if __name__ == "__main__":
    main(__doc__, measure)
