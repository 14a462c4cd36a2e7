"""Images as uint8 arrays, in memory or memory-mapped, read by index."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from core.device import CPU, fits_on, to_device


class Images:
    """N images of one size, RGB or gray.

    parts   arrays (n, C, H, W) of uint8 with C = 1 or 3, in any memory order; or one such tensor
    index   which of all images, in which order; None for all as they are
    """

    def __init__(self, parts: list[np.ndarray], index: np.ndarray | None = None) -> None:
        self.parts, self.index = parts, index
        self.offsets = np.cumsum([0] + [len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.offsets[-1]) if self.index is None else len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return tuple(self.parts[0].shape[2:])

    @property
    def gray(self) -> bool:
        """Whether the images are stored with one channel."""
        return self.parts[0].shape[1] == 1

    def take(self, indices: np.ndarray, device: torch.device = CPU) -> Tensor:
        """The images at `indices` on `device`: (B, 3, H, W) uint8.

        A gray image is copied to the device as one channel and expanded there.
        """
        if self.index is not None:
            indices = self.index[indices]
        first = self.parts[0]
        if isinstance(first, Tensor):
            images = first[to_device(indices, first.device)].to(device)
        elif len(self.parts) == 1:
            images = to_device(first[indices], device)
        else:
            # empty_like keeps the parts' memory order, which is faster to copy to
            pixels = np.empty_like(first, shape=(len(indices), *first.shape[1:]), subok=False)
            for part, start in zip(self.parts, self.offsets, strict=False):
                inside = (indices >= start) & (indices < start + len(part))
                pixels[inside] = part[indices[inside] - start]
            images = to_device(pixels, device)
        return images.expand(-1, 3, -1, -1)

    def resident(self, device: torch.device, when: str, block: int = 1024) -> "Images":
        """These images, copied to the device's memory if `when` allows it.

        when   always, never, or auto: if the copy takes less than half of a GPU's free memory
        """
        shape = self.parts[0].shape[1:]
        if when == "never" or (when == "auto" and not fits_on(device, len(self) * np.prod(shape))):
            return self
        pixels = torch.empty((len(self), *shape), dtype=torch.uint8, device=device)
        for start in range(0, len(self), block):
            rows = np.arange(start, min(start + block, len(self)))
            pixels[start : start + block] = self.take(rows, device)[:, : shape[0]]
        return Images([pixels])

    def subset(self, index: np.ndarray) -> "Images":
        """The images at `index`; no pixel is copied."""
        index = np.asarray(index)
        index = index if self.index is None else self.index[index]
        return Images(self.parts, index)

    def spread(self, most: int) -> np.ndarray:
        """Indices of at most `most` evenly spaced images."""
        return np.unique(np.linspace(0, len(self) - 1, most).astype(np.int64))

    def digest(self) -> str:
        """A fingerprint of their number and of 64 evenly spaced ones."""
        pixels = self.take(self.spread(64)).contiguous().numpy().tobytes()
        return hashlib.sha256(pixels + str(len(self)).encode()).hexdigest()[:16]

    def statistics(self, most: int = 1000) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel in 0..1, over `most` evenly spaced images."""
        pixels = self.take(self.spread(most)).transpose(0, 1).reshape(3, -1)
        values = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in pixels:  # from the histogram: exact, without a copy in float
            share = torch.bincount(channel.int(), minlength=256).double() / channel.numel()
            mean.append(float((share * values).sum()))
            std.append(max(float((share * (values - mean[-1]) ** 2).sum() ** 0.5), 1e-3))
        return mean, std
