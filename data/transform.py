"""Resize, crop and normalize images for an encoder in evaluation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.errors import UserError, warn_once
from data.datasets import DataConfig
from data.views import normalize


def frame(images: Tensor, size: int, crop: int) -> Tensor:
    """Resize the short side to `size`, then crop the center square of side `crop`; 0 skips either.

    (B, 3, H, W) uint8 -> (B, 3, h, w) float32 in 0..1, bicubic and antialiased.
    """
    x = images.float() / 255
    if size and min(x.shape[2:]) != size:
        shape = [side * size // min(x.shape[2:]) for side in x.shape[2:]]
        x = torch.nn.functional.interpolate(x, shape, mode="bicubic", antialias=True).clamp_(0, 1)
    if crop and x.shape[2:] != (crop, crop):
        top, left = (round((side - crop) / 2) for side in x.shape[2:])  # as torchvision rounds
        x = x[:, :, top : top + crop, left : left + crop]
    return x


def eval_sizes(data: DataConfig, shape: tuple[int, int]) -> tuple[int, int]:
    """`size` and `crop` of `frame` for images of `shape` (height, width).

    (--eval-size, --crop-size) if --eval-size is set; else (8/7 of --crop-size, --crop-size) above
    96 pixels.  Up to 96 it is the whole image, (0, 0), but enlarged as the views are if these are
    larger: (--crop-size, --crop-size).
    """
    if data.eval_size:
        if data.eval_size < data.crop_size:
            raise UserError(
                f"--eval-size {data.eval_size}: must be at least --crop-size {data.crop_size}"
            )
        return data.eval_size, data.crop_size
    if max(shape) > 96:
        return round(data.crop_size * 8 / 7), data.crop_size
    return (data.crop_size, data.crop_size) if data.crop_size > min(shape) else (0, 0)


def warn_enlarged(side: int, stored: int) -> None:
    """Warn once if images with a short side of `stored` pixels are enlarged to `side`."""
    if side > stored:
        text = f"images of {stored} pixels are enlarged to {side}: lower --crop-size"
        warn_once(f"{text}, or raise --store-size if they are packed")


@dataclass(frozen=True)
class EvalTransform:
    """Resize, center crop and normalization of an encoder's inputs in evaluation.

    mean, std    of the three channels, in 0..1
    size, crop   short side and center square in pixels, see `frame`
    stored       short side of the data set's images; PIL images are first made squares of this side
    """

    mean: list[float]
    std: list[float]
    size: int = 0
    crop: int = 0
    stored: int = 256

    @classmethod
    def of(cls, data: DataConfig, shape: tuple[int, int], mean, std) -> "EvalTransform":
        """The transform that the settings `data` give images of `shape` (height, width)."""
        size, crop = eval_sizes(data, shape)
        warn_enlarged(crop, min(shape))
        return cls(mean, std, size, crop, min(shape))

    @classmethod
    def from_meta(cls, meta: dict) -> "EvalTransform":
        """The transform in the meta of an encoder.pt; older files lack `frame` or `stored`."""
        stored = meta["stored"] if "stored" in meta else meta["crop_size"]
        return cls(meta["mean"], meta["std"], *meta.get("frame", (0, 0)), stored)

    def meta(self) -> dict:
        """Its entries in the meta of an encoder.pt."""
        frame = [self.size, self.crop]
        return {"mean": self.mean, "std": self.std, "stored": self.stored, "frame": frame}

    def __str__(self) -> str:
        resized = f"resized to {self.size} pixels" if self.size else "not resized"
        return f"{resized}, {f'center crop of {self.crop}' if self.crop else 'not cropped'}"

    def __call__(self, images) -> Tensor:
        """A PIL image, or uint8 (3, H, W) or (B, 3, H, W) -> (B, 3, h, w) float32, normalized."""
        if not isinstance(images, Tensor):
            from data.decode import square  # Pillow is slow to import

            images = torch.from_numpy(square(images, self.stored))
        if images.dtype != torch.uint8:
            raise TypeError(f"expected a PIL image or a uint8 tensor, not {images.dtype}")
        images = images if images.ndim == 4 else images[None]
        mean, std = (torch.tensor(v, device=images.device) for v in (self.mean, self.std))
        return normalize(frame(images, self.size, self.crop), mean, std)
