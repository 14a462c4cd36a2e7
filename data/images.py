"""Images as uint8 behind `take`, over one or several arrays that may be memory-mapped."""

import numpy as np
import torch
from torch import Tensor

from core.device import CPU, fits_on, to_device


class Images:
    """N images of one size, RGB or gray, read by index.

    parts          arrays (n, C, H, W) of uint8 with C = 1 or 3, one after another; or one tensor
                   in a device's memory
    column_major   the arrays are (n, C, W, H) instead, as STL-10's files are
    index          which of the images, in which order; None for all
    """

    def __init__(self, parts: list[np.ndarray], column_major=False, index=None) -> None:
        self.parts, self.column_major, self.index = parts, column_major, index
        self.offsets = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.offsets[-1]) if self.index is None else len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.parts[0].shape[2:]
        return (width, height) if self.column_major else (height, width)

    @property
    def gray(self) -> bool:
        """Whether they are stored with one channel."""
        return self.parts[0].shape[1] == 1

    def take(self, indices: np.ndarray, device: torch.device = CPU) -> Tensor:
        """The images at `indices` on `device`: (B, 3, H, W) uint8.

        A gray image is copied to the device as one channel, and repeated there.
        """
        images = self._stored(indices, device)
        if self.column_major:
            images = images.transpose(2, 3)
        return images.expand(-1, 3, -1, -1)

    def _stored(self, indices: np.ndarray, device: torch.device) -> Tensor:
        if self.index is not None:
            indices = self.index[indices]
        if isinstance(self.parts[0], Tensor):
            return self.parts[0][to_device(indices, self.parts[0].device)].to(device)
        if len(self.parts) == 1:
            pixels = self.parts[0][indices]
        else:
            pixels = np.empty((len(indices), *self.parts[0].shape[1:]), np.uint8)
            for part, start in zip(self.parts, self.offsets, strict=False):
                inside = (indices >= start) & (indices < start + len(part))
                pixels[inside] = part[indices[inside] - start]
        return to_device(np.ascontiguousarray(pixels), device)

    def resident(self, device: torch.device, when: str, block: int = 1024) -> "Images":
        """The same images in the device's memory, so that a GPU waits for no disk and no bus.

        when   always, never (then these images), or auto: if they take less than half of a GPU's
               free memory
        """
        shape = self.parts[0].shape[1:]
        if when == "never" or (when == "auto" and not fits_on(device, len(self) * np.prod(shape))):
            return self
        pixels = torch.empty((len(self), *shape), dtype=torch.uint8, device=device)
        for start in range(0, len(self), block):
            rows = np.arange(start, min(start + block, len(self)))
            pixels[start : start + block] = self._stored(rows, device)
        return Images([pixels], self.column_major)

    def subset(self, index: np.ndarray) -> "Images":
        """The images at `index`, as Images; no pixel is copied."""
        index = np.asarray(index)
        index = index if self.index is None else self.index[index]
        return Images(self.parts, self.column_major, index)

    def statistics(self, most: int = 1000) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel in 0..1, over `most` evenly spaced images."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(np.int64))
        pixels = self.take(chosen).transpose(0, 1).reshape(3, -1)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in pixels:  # from the histogram: exact, and no copy in float
            share = torch.bincount(channel.int(), minlength=256).double() / channel.numel()
            mean.append(float((share * values).sum()))
            std.append(max(float((share * (values - mean[-1]) ** 2).sum() ** 0.5), 1e-3))
        return mean, std
