"""The loader: a pure function of the step index, without worker processes.

An epoch's order comes from (seed, epoch).  Step k takes a contiguous block of the GLOBAL batch of
it, micro-batches are contiguous blocks of that, a rank takes its slice inside each.  The views'
random numbers of step k are drawn for the global batch from (seed, stream, k).  So the images and
pixels are the same for any number of processes, and a resume needs the step alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.device import CPU, to_device
from core.errors import UserError
from data.images import Images
from data.transform import EvalTransform, warn_enlarged
from data.views import ViewConfig, apply, draw, normalise

ORDER, VIEWS = 1, 2  # streams of random numbers


def generator(seed: int, stream: int, step: int) -> np.random.Generator:
    """SeedSequence mixes the three, where a sum would make seeds and steps collide."""
    return np.random.default_rng(np.random.SeedSequence([seed, stream, step]))


@dataclass
class Loader:
    """Micro-batches of views for each step.

    images, labels   what to train on; labels may be None
    views            one ViewConfig for each view; crop_size where they name no size
    batch_size       GLOBAL, cut into `accumulate` micro-batches, each shared by the processes
    mean, std        three floats each
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
        """As the sections data, optim and run say, normalized as for evaluation.

        processes   with device, rank and world_size of this one
        """
        o, p, size = config.optim, processes, config.data.crop_size
        warn_enlarged(max(view.size or size for view in views), min(images.shape))
        images = images.resident(p.device, config.run.data_on_device)
        settings = images, labels, views, size, o.batch_size, transform.mean, transform.std
        ours = config.run.seed, o.accumulate, p.device, p.rank, p.world_size
        return cls(*settings, *ours)

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
        self._order = (-1, None)
        as_tensor = dict(dtype=self.dtype, device=self.device)
        self._mean, self._std = (torch.tensor(v, **as_tensor) for v in (self.mean, self.std))

    def indices(self, step: int) -> np.ndarray:
        """The images of the global batch of a step, (batch_size,)."""
        epoch, block = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, generator(self.seed, ORDER, epoch).permutation(len(self.images)))
        return self._order[1][block * self.batch_size : (block + 1) * self.batch_size]

    def batches(self, step: int):
        """Yield (views, labels) of this rank for each micro-batch; views is a tuple of tensors."""
        indices = self.indices(step)
        rng = generator(self.seed, VIEWS, step)
        height, width = self.images.shape
        drawn = [draw(view, self.batch_size, height, width, rng) for view in self.views]
        micro = self.batch_size // self.accumulate
        share = micro // self.world_size
        for first in range(self.rank * share, self.batch_size, micro):
            mine = slice(first, first + share)
            pixels = self.images.gather(indices[mine], self.device)
            parameters = [{k: v[mine] for k, v in d.items()} for d in drawn]
            yield self.make_views(pixels, parameters), self._labels(indices[mine])

    def preview(self, count: int = 16) -> Tensor:
        """The first step's views of `count` images: a row a view, (3, rows, columns) in 0..1."""
        rng = generator(self.seed, VIEWS, 0)
        drawn = [draw(view, self.batch_size, *self.images.shape, rng) for view in self.views]
        pixels = self.images.gather(self.indices(0)[:count], self.device)
        views = self.make_views(pixels, [{k: v[:count] for k, v in d.items()} for d in drawn])
        side, rows = max(view.shape[2] for view in views), []
        for view in views:
            x = (view * self._std.view(3, 1, 1) + self._mean.view(3, 1, 1)).clamp(0, 1)
            x = torch.nn.functional.interpolate(x, (side, side))  # smaller crops as large as others
            rows.append(torch.cat(list(x), 2))
        return torch.cat(rows, 1).cpu()

    @torch.no_grad()
    def make_views(self, pixels: Tensor, parameters: list[dict]) -> tuple[Tensor, ...]:
        """Normalised views of uint8 images by what `draw` drew for each of `views`."""
        return tuple(
            normalise(
                apply(pixels, view, drawn, view.size or self.crop_size, self.dtype),
                self._mean,
                self._std,
            )
            for view, drawn in zip(self.views, parameters, strict=True)
        )

    def _labels(self, indices: np.ndarray) -> Tensor | None:
        if self.labels is None:
            return None
        return to_device(self.labels[indices], self.device)
