"""Frozen encoders, and features of data sets that are computed once."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from data.images import Images
from data.labelled import Labelled
from data.transform import EvalTransform, frame
from eval.features import extract
from training.distributed import SINGLE, Processes


@dataclass
class FrozenEncoder:
    """An encoder on its device with its transform, as a function: Images -> (N, feature_size)."""

    encoder: nn.Module
    transform: EvalTransform
    processes: Processes = SINGLE

    def __post_init__(self) -> None:
        self.encoder.to(self.processes.device, memory_format=torch.channels_last)

    def __call__(self, images: Images) -> Tensor:
        return extract(self.encoder, images, self.transform, self.processes)


class Features:
    """Features of labelled images, by `extract` once for each set of images.

    dataset   all its train images are computed at once, where several parts of them will follow
    """

    def __init__(self, extract, dataset=None) -> None:
        self.extract, self.dataset = cache(extract), dataset

    def __call__(self, labelled: Labelled) -> Tensor:
        if self.dataset is None or labelled.index is None:
            return self.extract(labelled.images)
        return self.extract(self.dataset.train)[labelled.index]


def pixels(images: Images, side: int = 32) -> Tensor:
    """The raw-pixel control: values in 0..1 at most `side` pixels high, (N, 3 * h * w).

    Gray images have one channel.
    """
    height, blocks = min(side, images.shape[0]), torch.arange(len(images)).split(1024)
    x = torch.cat([frame(images.gather(rows.numpy()), height, 0) for rows in blocks])
    return (x[:, :1] if images.gray else x).flatten(1)
