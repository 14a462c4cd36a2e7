"""Batches of views as a pure function of the step index, without worker processes.

The order of an epoch comes from (seed, epoch).  A step takes a block of it, the GLOBAL batch.  This
is cut into micro-batches, and each of them into one slice for each rank.  The views' random numbers
come from (seed, step), for the global batch, one view after the other.  So images and pixels are
the same for any number of processes, and a resume needs only the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from core.device import CPU, to_device
from core.errors import UserError
from data.images import Images
from data.transform import EvalTransform, warn_enlarged
from data.views import ViewConfig, apply, draw, normalize

ORDER, VIEWS = 1, 2  # streams of random numbers


def generator(seed: int, stream: int, step: int) -> np.random.Generator:
    """NumPy's generator for a step; seeding with a sum would repeat steps of other seeds."""
    return np.random.default_rng(np.random.SeedSequence([seed, stream, step]))


@dataclass
class Loader:
    """Micro-batches of views for each step.

    images, labels   what to train on; labels may be None
    views            one ViewConfig for each view
    crop_size        side in pixels of the views whose `size` is 0
    batch_size       GLOBAL, cut into `accumulate` micro-batches, each split among the processes
    mean, std        of the three channels, in 0..1
    rank             of this process among `world_size`; its views are made on `device`
    """

    images: Images
    labels: np.ndarray | None
    views: tuple[ViewConfig, ...]
    crop_size: int
    batch_size: int
    mean: list[float]
    std: list[float]
    seed: int = 0
    accumulate: int = 1
    device: torch.device = CPU
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, config, images, labels, views, transform: EvalTransform, processes) -> "Loader":
        """A loader as [data], [optim] and [run] say, for the rank and device of `processes`."""
        crop_size, device = config.data.crop_size, processes.device
        warn_enlarged(max(view.size or crop_size for view in views), min(images.shape))
        return cls(
            images=images.resident(device, config.run.data_on_device),
            labels=labels,
            views=views,
            crop_size=crop_size,
            batch_size=config.optim.batch_size,
            mean=transform.mean,
            std=transform.std,
            seed=config.run.seed,
            accumulate=config.optim.accumulate,
            device=device,
            rank=processes.rank,
            world_size=processes.world_size,
        )

    def __post_init__(self) -> None:
        parts = self.accumulate * self.world_size
        if self.batch_size > len(self.images):
            raise UserError(
                f"--batch-size {self.batch_size}: there are only {len(self.images)} training images"
            )
        if self.batch_size % parts or self.batch_size // parts < 2:
            raise UserError(
                f"--batch-size {self.batch_size}: each of {self.world_size} processes x "
                f"{self.accumulate} micro-batches needs the same number of images, at least 2"
            )
        for number, view in enumerate(self.views, 1):
            view.check(f"view{number}")
        self.steps_per_epoch = len(self.images) // self.batch_size
        self._epoch = -1  # whose order is in self._order
        self._mean = torch.tensor(self.mean, dtype=self.dtype, device=self.device)
        self._std = torch.tensor(self.std, dtype=self.dtype, device=self.device)

    def indices(self, step: int) -> np.ndarray:
        """Indices of the images in the global batch of a step, (batch_size,)."""
        epoch, block = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = generator(self.seed, ORDER, epoch).permutation(len(self.images))
        return self._order[block * self.batch_size : (block + 1) * self.batch_size]

    def batches(self, step: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Yield (views, labels) of this rank for each micro-batch; labels are (b,) or None."""
        indices, drawn = self.indices(step), self._draw(step)
        micro = self.batch_size // self.accumulate
        share = micro // self.world_size
        for first in range(self.rank * share, self.batch_size, micro):
            part = slice(first, first + share)
            chosen = indices[part]
            pixels = self.images.take(chosen, self.device)
            labels = None if self.labels is None else to_device(self.labels[chosen], self.device)
            yield self.make_views(pixels, drawn, part), labels

    def preview(self, count: int = 16) -> Tensor:
        """A picture of the first step, a row of `count` images for each view: (3, H, W) in 0..1."""
        pixels = self.images.take(self.indices(0)[:count], self.device)
        views = self.make_views(pixels, self._draw(0), slice(count))
        side = max(view.shape[2] for view in views)  # smaller crops are enlarged to it
        x = torch.cat([torch.nn.functional.interpolate(view, (side, side)) for view in views])
        x = (x * self._std.view(3, 1, 1) + self._mean.view(3, 1, 1)).clamp(0, 1)
        return make_grid(x, nrow=len(pixels), padding=0).cpu()

    def _draw(self, step: int) -> list[dict]:
        """The random numbers of each view, for the global batch of a step."""
        rng = generator(self.seed, VIEWS, step)
        return [draw(view, self.batch_size, *self.images.shape, rng) for view in self.views]

    @torch.no_grad()
    def make_views(self, pixels, drawn: list[dict], part=slice(None)) -> tuple[Tensor, ...]:
        """Normalized views of uint8 images (B, 3, H, W): one (B, 3, side, side) for each view.

        drawn   what `draw` returned for each view, for these images or for more
        part    slice or indices of these images in the arrays of `drawn`
        """
        sizes = [view.size or self.crop_size for view in self.views]
        made = {}  # number of a view -> its images
        for size in dict.fromkeys(sizes):  # all views of one size are made as one batch
            same = [n for n, other in enumerate(sizes) if other == size]
            joined = {k: np.concatenate([drawn[n][k][part] for n in same]) for k in drawn[0]}
            x = normalize(apply(pixels, joined, size, self.dtype), self._mean, self._std)
            made |= zip(same, x.chunk(len(same)), strict=True)
        return tuple(made[n] for n in range(len(sizes)))
