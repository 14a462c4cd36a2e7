"""The random views of BYOL (App. B, Table 6), drawn for each image, applied to a whole batch.

`draw` chooses every random number of a batch on the CPU; `apply` turns images into views by them.
Each operation gives what torchvision.transforms.v2.functional gives on float images.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.device import to_device
from core.errors import UserError
from core.options import option

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
# HSV to RGB without cases: high - spread clamp(2 - |h - 3|) for red, clamp(|h - 2| - 1) for green,
# clamp(|h - 4| - 1) for blue, h in sixths of the circle.  Rows: center, sign, offset
HUE = np.array([[3.0, 2.0, 4.0], [-1.0, 1.0, 1.0], [2.0, -1.0, -1.0]])


@dataclass
class ViewConfig:
    """One random view, in the order of its operations."""

    size: int = option(0, "side of the view, pixels (0: --crop-size)", low=0)
    area: list[float] = option([0.08, 1.0], "area fraction of the crop, from to", low=0.001, high=1)
    shift: int = option(0, "zero border around the image before the crop, pixels", low=0)
    aspect: list[float] = option([0.75, 4 / 3], "width / height of the crop, from to", low=0.1)
    flip_p: float = option(0.5, "probability of a mirror image", low=0, high=1)
    jitter_p: float = option(0.8, "probability of color jitter, in random order", low=0, high=1)
    brightness: float = option(0.4, "jitter: factor 1 +- this", low=0, high=1)
    contrast: float = option(0.4, "jitter: factor 1 +- this", low=0, high=1)
    saturation: float = option(0.2, "jitter: factor 1 +- this", low=0, high=1)
    hue: float = option(0.1, "jitter: turn of the color circle, +- this", low=0, high=0.5)
    grey_p: float = option(0.2, "probability of a gray image", low=0, high=1)
    blur_p: float = option(1.0, "probability of Gaussian blur", low=0, high=1)
    blur_sigma: list[float] = option([0.1, 2.0], "its standard deviation, pixels", low=0.01)
    solarize_p: float = option(0.0, "probability of inverting pixels >= 0.5", low=0, high=1)

    @classmethod
    def supervised(cls, area: list[float], shift: int, flip_p: float) -> "ViewConfig":
        """Crop or shift, and flip: the augmentation of labelled training."""
        aspect = [0.75, 4 / 3] if area[0] < 1 else [1.0, 1.0]
        off = dict(jitter_p=0.0, grey_p=0.0, blur_p=0.0)
        return cls(area=area, shift=shift, aspect=aspect, flip_p=flip_p, **off)

    def check(self, label: str) -> None:
        """UserError unless area, aspect and blur_sigma are two values, the smaller first."""
        for name in ("area", "aspect", "blur_sigma"):
            pair = getattr(self, name)
            if len(pair) != 2 or pair[0] > pair[1]:
                raise UserError(f"{label}.{name} = {pair}: expected two values, smaller first")


@dataclass
class View2Config(ViewConfig):
    """The second view differs: rarely blurred, sometimes solarized."""

    blur_p: float = option(0.1, "probability of Gaussian blur", low=0, high=1)
    solarize_p: float = option(0.2, "probability of inverting pixels >= 0.5", low=0, high=1)


def draw(view: ViewConfig, count: int, height: int, width: int, rng: np.random.Generator) -> dict:
    """All random numbers for one view of `count` images of height x width, by name.

    Arrays of length `count`: integer boxes top, left, h, w; booleans flip, jitter, grey, blur,
    solarize; the factors brightness, contrast, saturation, hue; `order` (count, 4), a permutation
    of these four; and sigma in pixels.  The crop is drawn once, rounded and clipped, as in the
    authors' code (torchvision draws up to ten times).
    """
    area = height * width * rng.uniform(*view.area, count)
    ratio = np.exp(rng.uniform(*np.log(view.aspect), count))
    h = np.clip(np.rint(np.sqrt(area / ratio)), 1, height).astype(np.int64)
    w = np.clip(np.rint(np.sqrt(area * ratio)), 1, width).astype(np.int64)
    drawn = {
        "top": rng.integers(-view.shift, height - h + 1 + view.shift),
        "left": rng.integers(-view.shift, width - w + 1 + view.shift),
        "h": h,
        "w": w,
    }
    for name in ("flip", "jitter", "grey", "blur", "solarize"):
        drawn[name] = rng.random(count) < getattr(view, f"{name}_p")
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(view, name)
        drawn[name] = rng.uniform(max(0, 1 - strength), 1 + strength, count)
    drawn["hue"] = rng.uniform(-view.hue, view.hue, count)
    drawn["order"] = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)
    drawn["sigma"] = rng.uniform(*view.blur_sigma, count)
    return drawn


def apply(images: Tensor, view: ViewConfig, drawn: dict, size: int, dtype=torch.float32) -> Tensor:
    """The views of uint8 images (B, 3, H, W) by what `draw` drew: (B, 3, size, size) in 0..1."""
    height, width = images.shape[2:]
    t = {k: to_device(v, images.device) for k, v in drawn.items()}
    t |= {k: v.to(dtype)[:, None, None, None] for k, v in t.items() if v.is_floating_point()}
    rows = resize_matrix(t["top"], t["h"], height, size, dtype, view.shift)
    columns = resize_matrix(t["left"], t["w"], width, size, dtype, view.shift, t["flip"])
    # memory in the order (B, H, 3, W): both products are then plain ones
    x = images.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format) / 255
    x = separable(x, rows, columns).clamp_(0, 1)
    color_jitter(x, view, drawn, t)
    change(x, drawn["grey"], luma)
    change(x, drawn["blur"], blur, t["sigma"])
    change(x, drawn["solarize"], solarize)
    return x


def change(x: Tensor, chosen: np.ndarray, operation: Callable, *parameters: Tensor) -> None:
    """Replace the chosen images of x by operation(images, their parameters), in place.

    chosen   (B,) booleans on the CPU: a GPU would have to be waited for to know how many
    """
    indices = np.flatnonzero(chosen)
    if len(indices) == 0:
        return
    where = slice(None) if len(indices) == len(x) else to_device(indices, x.device)
    x[where] = operation(x[where], *(values[where] for values in parameters))


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std for each channel, in place, in channels-last memory."""
    x = x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
    return x.contiguous(memory_format=torch.channels_last)


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply each image by its row and column matrices: (B, H, 3, W) -> (B, 3, h, w)."""
    batch, height, channels, width = x.shape
    x = torch.bmm(x.reshape(batch, height * channels, width), columns.transpose(1, 2))
    x = torch.bmm(rows, x.view(batch, height, -1))
    return x.view(batch, x.shape[1], channels, -1).transpose(1, 2)


def resize_matrix(
    start: Tensor, length: Tensor, full: int, size: int, dtype, border: int = 0, flip=None
) -> Tensor:
    """Crop and antialiased bicubic resize along one axis, a (size, full) matrix for each image.

    Keys' cubic with a = -0.5; the window is cut at the crop's edge and its weights normalized, as
    in torchvision's float `resized_crop(..., BICUBIC, antialias=True)`.  The crop may reach
    `border` pixels beyond the image, where it is zero.  Where `flip`, the result is mirrored.
    """
    if border:
        padded = resize_matrix(start + border, length, full + 2 * border, size, dtype, 0, flip)
        return padded[:, :, border : border + full].contiguous()
    start, length = start[:, None, None], length[:, None, None]
    scale = length.to(dtype) / size
    stretch = scale.clamp(min=1)
    i = torch.arange(size, device=start.device, dtype=dtype)[None, :, None]
    if flip is not None:
        i = torch.where(flip[:, None, None], size - 1 - i, i)
    center = scale * (i + 0.5)
    low = (center - 2 * stretch + 0.5).floor().clamp(min=0)
    high = torch.minimum((center + 2 * stretch + 0.5).floor(), length)
    # the few pixels that count, at most so many for crops of any length
    taps = torch.arange(math.ceil(4 * max(1, full / size)) + 1, device=start.device, dtype=dtype)
    j = low + taps
    weight = cubic((j - center + 0.5) / stretch) * (j < high)
    weight = weight / weight.sum(2, keepdim=True)
    pixel = (j.long() + start).clamp_(max=full - 1)
    matrix = torch.zeros(len(start), size, full, dtype=dtype, device=start.device)
    return matrix.scatter_add_(2, pixel, weight)


def cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic convolution kernel (1981), support -2..2."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of square images, reflected at the border; its window is a tenth of a side."""
    size, taps = x.shape[3], 2 * (x.shape[3] // 20) + 1
    offsets = torch.arange(taps, device=x.device) - taps // 2
    kernel = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma[:, 0, 0]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = torch.arange(size, device=x.device)[:, None] + offsets
    source = source.abs()  # reflect on the left, then on the right
    source = (size - 1) - (size - 1 - source).abs()
    matrix = torch.zeros(len(x), size, size, dtype=x.dtype, device=x.device)
    values = kernel[:, None, :].expand(-1, size, -1).contiguous()
    matrix.scatter_add_(2, source.expand(len(x), -1, -1), values)
    return separable(x.transpose(1, 2), matrix, matrix)


def color_jitter(x: Tensor, view: ViewConfig, drawn: dict, t: dict[str, Tensor]) -> None:
    """Brightness, contrast, saturation and hue in each image's own order, in place.

    First all images that begin with brightness, then all that begin with contrast, ...
    """
    operations = (brightness, contrast, saturation, hue)
    for place, (number, operation) in itertools.product(range(4), enumerate(operations)):
        name = operation.__name__
        if getattr(view, name):
            chosen = drawn["jitter"] & (drawn["order"][:, place] == number)
            change(x, chosen, operation, t[name])


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """x times factor."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luma of the image."""
    mean = luma(x).mean(dim=(1, 2, 3), keepdim=True)
    return (x * factor).add_((1 - factor) * mean).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luma of each pixel."""
    return (x * factor).add_(luma(x).mul_(1 - factor)).clamp_(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` of a full circle (-0.5..0.5)."""
    r, g, b = x.split(1, dim=1)
    high = torch.maximum(torch.maximum(r, g), b)
    spread = high - torch.minimum(torch.minimum(r, g), b)
    is_r, is_g = r == high, g == high
    # in sixths of the circle; where there is no color the numerator is 0
    h = torch.where(is_r, g - b, torch.where(is_g, b - r, r - g)).div_(spread.clamp(min=1e-12))
    h += torch.where(is_r, 0.0, torch.where(is_g, 2.0, 4.0)).to(x.dtype)
    h = torch.remainder(h.add_(6 * shift), 6)
    center, sign, offset = to_device(HUE, x.device).to(x.dtype).view(3, 1, 3, 1, 1)
    share = (h - center).abs_().mul_(sign).add_(offset).clamp_(0, 1)
    return (high - share.mul_(spread)).clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    """Gray level of RGB images: (B, 3, H, W) -> (B, 1, H, W)."""
    r, g, b = x.split(1, dim=1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def solarize(x: Tensor) -> Tensor:
    """Invert what is at least 0.5."""
    return torch.where(x >= 0.5, 1 - x, x)
