"""The random views of BYOL (App. B, Table 6), drawn for each image, applied to a whole batch.

`draw` chooses every random number of a batch on the CPU; `apply` turns images into views by them.
What each operation means is settled by torchvision.transforms.v2.functional on float images.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.config import UserError, option

GREY = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue


@dataclass
class ViewConfig:
    """One random view, in the order of its operations."""

    size: int = option(0, "side of the view, pixels (0: --crop-size)", low=0)
    area: list[float] = option([0.08, 1.0], "area fraction of the crop, from to", low=0.001, high=1)
    shift: int = option(0, "zero border around the image before the crop, pixels", low=0)
    aspect: list[float] = option([0.75, 4 / 3], "width / height of the crop, from to", low=0.1)
    flip_p: float = option(0.5, "probability of a mirror image", low=0, high=1)
    jitter_p: float = option(0.8, "probability of colour jitter, in random order", low=0, high=1)
    brightness: float = option(0.4, "jitter: factor 1 +- this", low=0, high=1)
    contrast: float = option(0.4, "jitter: factor 1 +- this", low=0, high=1)
    saturation: float = option(0.2, "jitter: factor 1 +- this", low=0, high=1)
    hue: float = option(0.1, "jitter: turn of the colour circle, +- this", low=0, high=0.5)
    grey_p: float = option(0.2, "probability of a grey image", low=0, high=1)
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
        """UserError unless each from-to pair is one."""
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
    """All random numbers for one view of `count` images of height x width.

    Returns arrays of length `count`: integer boxes top, left, h, w; flip, jitter, grey, blur,
    solarize as booleans; the jitter's factors; `order` (count, 4), a permutation of brightness,
    contrast, saturation, hue; and sigma, pixels.  The crop is drawn once, rounded and clipped, as
    in the authors' code (torchvision draws up to ten times).
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
    device = images.device
    t = {k: torch.from_numpy(v).to(device, non_blocking=True) for k, v in drawn.items()}
    x = images.to(dtype) / 255
    rows = resize_matrix(t["top"], t["h"], x.shape[2], size, dtype, view.shift)
    columns = resize_matrix(t["left"], t["w"], x.shape[3], size, dtype, view.shift)
    columns = torch.where(t["flip"][:, None, None], columns.flip(1), columns)
    x = separable(x, rows, columns).clamp_(0, 1)
    x = colour_jitter(x, view, drawn, t)
    for chosen in _where(drawn["grey"], device):
        x[chosen] = grey(x[chosen]).expand(-1, 3, -1, -1)
    for chosen in _where(drawn["blur"], device):
        matrix = blur_matrix(t["sigma"][chosen], size, 2 * (size // 20) + 1, dtype)
        x[chosen] = separable(x[chosen], matrix, matrix)
    for chosen in _where(drawn["solarize"], device):
        part = x[chosen]
        x[chosen] = torch.where(part >= 0.5, 1 - part, part)
    return x


def normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std for each channel, in place, in channels-last memory."""
    x = x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
    return x.contiguous(memory_format=torch.channels_last)


def _where(chosen: np.ndarray, device) -> list[Tensor]:
    """The indices of the chosen images as a list of one tensor; an empty list for no image."""
    indices = np.flatnonzero(chosen)
    return [torch.from_numpy(indices).to(device)] if len(indices) else []


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply each image by its row and column matrices: (B, 3, H, W) -> (B, 3, h, w)."""
    batch, channels, height, width = x.shape
    x = torch.bmm(x.reshape(batch, channels * height, width), columns.transpose(1, 2))
    x = x.view(batch, channels, height, -1)
    return torch.matmul(rows[:, None], x)


def resize_matrix(
    start: Tensor, length: Tensor, full: int, size: int, dtype, border: int = 0
) -> Tensor:
    """Crop and antialiased bicubic resize along one axis, a (size, full) matrix for each image.

    Keys' cubic with a = -0.5; the window is cut at the crop's edge and renormalised, as in
    torchvision's float `resized_crop(..., BICUBIC, antialias=True)`.  The crop may reach `border`
    pixels beyond the image, where it is zero.
    """
    if border:
        matrix = resize_matrix(start + border, length, full + 2 * border, size, dtype)
        return matrix[:, :, border : border + full].contiguous()
    start, length = start[:, None, None], length[:, None, None]
    scale = length.to(dtype) / size
    stretch = scale.clamp(min=1)
    i = torch.arange(size, device=start.device, dtype=dtype)[None, :, None]
    j = torch.arange(full, device=start.device, dtype=dtype)[None, None, :]
    centre = scale * (i + 0.5)
    low = (centre - 2 * stretch + 0.5).floor().clamp(min=0) + start
    high = torch.minimum((centre + 2 * stretch + 0.5).floor(), length) + start
    weight = cubic(((j - start) - centre + 0.5) / stretch) * ((j >= low) & (j < high))
    return weight / weight.sum(2, keepdim=True)


def cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic convolution kernel (1981), support -2..2."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def blur_matrix(sigma: Tensor, size: int, taps: int, dtype) -> Tensor:
    """Gaussian blur along one axis with reflected border, a (size, size) matrix for each image."""
    offsets = torch.arange(taps, device=sigma.device) - taps // 2
    kernel = torch.exp(-0.5 * (offsets.to(dtype) / sigma.to(dtype)[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = torch.arange(size, device=sigma.device)[:, None] + offsets
    source = source.abs()  # reflect on the left, then on the right
    source = (size - 1) - (size - 1 - source).abs()
    matrix = torch.zeros(len(sigma), size, size, dtype=dtype, device=sigma.device)
    values = kernel[:, None, :].expand(-1, size, -1).contiguous()
    return matrix.scatter_add_(2, source.expand(len(sigma), -1, -1), values)


def grey(x: Tensor) -> Tensor:
    """Luma of RGB images: (B, 3, H, W) -> (B, 1, H, W)."""
    return (x[:, 0] * GREY[0] + x[:, 1] * GREY[1] + x[:, 2] * GREY[2])[:, None]


def colour_jitter(x: Tensor, view: ViewConfig, drawn: dict, t: dict) -> Tensor:
    """Brightness, contrast, saturation and hue in each image's own order, clamped after each."""
    operations = (brightness, contrast, saturation, hue)
    strengths = (view.brightness, view.contrast, view.saturation, view.hue)
    for position in range(4):
        for index, operation in enumerate(operations):
            if not strengths[index]:
                continue
            now = drawn["jitter"] & (drawn["order"][:, position] == index)
            for chosen in _where(now, x.device):
                factor = t[operation.__name__][chosen].to(x.dtype).view(-1, 1, 1, 1)
                x[chosen] = operation(x[chosen], factor)
    return x


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """x times factor."""
    return (x * factor).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luma of the image."""
    mean = grey(x).mean(dim=(1, 2, 3), keepdim=True)
    return (factor * x + (1 - factor) * mean).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luma of each pixel."""
    return (factor * x + (1 - factor) * grey(x)).clamp_(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by `shift` of a full circle (-0.5..0.5)."""
    high, low = x.amax(1), x.amin(1)
    spread = high - low
    r, g, b = ((high[:, None] - x) / torch.where(spread > 0, spread, 1.0)[:, None]).unbind(1)
    is_r, is_g = x[:, 0] == high, x[:, 1] == high
    h = torch.where(is_r, b - g, torch.where(is_g, 2 + r - b, 4 + g - r))
    h = torch.where(spread > 0, h / 6, 0.0) + shift[:, 0]
    # HSV to RGB without cases: channel n is v - s v max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6
    channel = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    k = torch.remainder(channel + 6 * h[:, None], 6)
    return (high[:, None] - spread[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)).clamp_(0, 1)


def frame(images: Tensor, size: int, crop: int) -> Tensor:
    """Evaluation geometry: short side to `size`, centre square of `crop`; 0 for either: as it is.

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
