"""Frozen encoders: their features of data sets, each image's computed once."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from data.images import Images
from data.labelled import Labelled
from data.transform import EvalTransform, frame
from eval.features import extract
from training.distributed import SINGLE, Processes


@dataclass
class FrozenEncoder:
    """An encoder on its device, and how its inputs are made: Images -> features."""

    encoder: nn.Module
    transform: EvalTransform
    processes: Processes = SINGLE

    def __post_init__(self) -> None:
        self.encoder.to(self.processes.device, memory_format=torch.channels_last)

    def __call__(self, images: Images) -> Tensor:
        """(N, feature_size), see `extract`."""
        return extract(self.encoder, images, self.transform, self.processes)


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
    return (x[:, :1] if images.gray else x).flatten(1)
