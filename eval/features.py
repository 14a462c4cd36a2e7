"""Frozen features: the encoder in eval mode on the evaluation geometry, in float32."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.datasets import Labelled
from data.images import Images
from data.views import frame
from training.distributed import SINGLE, Processes, sum_over_ranks


@torch.no_grad()
def extract(
    encoder: nn.Module,
    images: Images,
    mean: list[float],
    std: list[float],
    sizes: tuple[int, int] = (0, 0),
    processes: Processes = SINGLE,
    batch_size: int = 256,
) -> Tensor:
    """The encoder's output for every image, in order: (N, feature_size) float32, on the CPU.

    sizes   short side and centre crop, see `frame`
    Each rank computes blocks of its own; the sum puts them together without padding.
    """
    was_training, device = encoder.training, processes.device
    encoder.eval()
    mean_, std_ = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))
    features = torch.zeros(len(images), encoder.feature_size, device=device)
    for block in range(processes.rank, -(-len(images) // batch_size), processes.world_size):
        rows = np.arange(block * batch_size, min((block + 1) * batch_size, len(images)))
        x = frame(images.gather(rows, device), *sizes)
        x = ((x - mean_) / std_).contiguous(memory_format=torch.channels_last)
        features[rows[0] : rows[-1] + 1] = encoder(x).float()
    encoder.train(was_training)
    return sum_over_ranks(features).cpu()


@dataclass
class FrozenEncoder:
    """An encoder and how its inputs are prepared: called on images, it gives their features."""

    encoder: nn.Module
    mean: list[float]
    std: list[float]
    sizes: tuple[int, int] = (0, 0)
    processes: Processes = SINGLE

    def __post_init__(self) -> None:
        self.encoder.to(self.processes.device, memory_format=torch.channels_last)

    def __call__(self, images: Images) -> Tensor:
        """(N, feature_size), see `extract`."""
        return extract(self.encoder, images, self.mean, self.std, self.sizes, self.processes)


class Features:
    """Features of labelled images, each image's computed once.

    extract   function of Images, such as a FrozenEncoder
    dataset   where several splits of its images follow; else the one split's are computed
    """

    def __init__(self, extract, dataset=None) -> None:
        self.extract, self.dataset, self.known = extract, dataset, {}

    def __call__(self, labelled: Labelled) -> Tensor:
        """(N, feature_size)"""
        if self.dataset is None:
            return self.extract(labelled.images)
        is_test = labelled.index is None
        if is_test not in self.known:
            self.known[is_test] = self.extract(labelled.images if is_test else self.dataset.train)
        return self.known[is_test] if is_test else self.known[is_test][labelled.index]


def pixels(images: Images, side: int = 32) -> Tensor:
    """The raw-pixel control: values in 0..1 at most `side` pixels high, (N, 3 * h * w).

    Grey images have one channel.
    """
    height = images.shape[0]
    blocks = []
    for first in range(0, len(images), 1024):
        rows = np.arange(first, min(first + 1024, len(images)))
        blocks.append(frame(images.gather(rows), min(side, height), 0))
    x = torch.cat(blocks)
    return (x[:, :1] if images.grey else x).flatten(1)
