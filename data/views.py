"""The random views of BYOL (App. B, Table 6): drawn for each image, applied to a whole batch.

`draw` draws all random numbers of a batch on the CPU; `apply` makes the views with them.
Each operation has the result of torchvision.transforms.v2.functional on float images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.device import memory_format, to_device
from core.errors import UserError
from core.options import option

LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue
# A channel is high - spread * clamp(sign * |h - center| + offset, 0, 1), see adjust_hue, with the
# hue h in sixths of the color circle.  Rows: center, sign, offset; columns: red, green, blue
HSV_TO_RGB = np.array([[3.0, 2.0, 4.0], [-1.0, 1.0, 1.0], [2.0, -1.0, -1.0]])
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # as numbered in `order`, see `draw`


@dataclass
class ViewConfig:
    """One random view: its operations in the order in which they are applied."""

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

    Arrays of length `count`: the crop's top, left, h, w in whole pixels; booleans flip, jitter,
    grey, blur, solarize; the factors brightness, contrast, saturation; hue, a fraction of the
    color circle; sigma in pixels; and `order` (count, 4), a permutation of BRIGHTNESS ... HUE.
    A crop is drawn once and clipped, as in the authors' code (torchvision draws up to ten times).
    All views of a step share `rng`: a new draw here would change the later ones, see docs/fork.md.
    """
    area = height * width * rng.uniform(*view.area, count)
    ratio = np.exp(rng.uniform(*np.log(view.aspect), count))
    h = np.clip(np.rint(np.sqrt(area / ratio)), 1, height).astype(np.int64)
    w = np.clip(np.rint(np.sqrt(area * ratio)), 1, width).astype(np.int64)
    drawn = {"h": h, "w": w}
    drawn["top"] = rng.integers(-view.shift, height - h + 1 + view.shift)
    drawn["left"] = rng.integers(-view.shift, width - w + 1 + view.shift)
    for name in ("flip", "jitter", "grey", "blur", "solarize"):
        drawn[name] = rng.random(count) < getattr(view, f"{name}_p")
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(view, name)
        drawn[name] = rng.uniform(max(0, 1 - strength), 1 + strength, count)
    drawn["hue"] = rng.uniform(-view.hue, view.hue, count)
    drawn["order"] = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)
    drawn["sigma"] = rng.uniform(*view.blur_sigma, count)
    return drawn


def apply(images: Tensor, drawn: dict, size: int, dtype=torch.float32) -> Tensor:
    """Views of uint8 images (B, 3, H, W): (N, 3, size, size) in 0..1.

    drawn   what `draw` returns, for N = V * B views; view n is made from image n % B
    """
    # color_jitter needs the views sorted by the place of the hue in their jitter, the last first
    hue_place = np.where(drawn["jitter"], (drawn["order"] == HUE).argmax(1), -1)
    sorting = np.argsort(-hue_place, kind="stable")
    drawn = {name: values[sorting] for name, values in drawn.items()}
    chosen = {name: np.flatnonzero(drawn[name]) for name in ("grey", "blur", "solarize")}
    arrays = {
        "image": sorting % len(images),
        "unsorting": np.argsort(sorting),
        # of the crops' rows, then of their columns; rows are not mirrored
        "start": np.concatenate([drawn["top"], drawn["left"]]),
        "length": np.concatenate([drawn["h"], drawn["w"]]),
        "flip": np.concatenate([np.zeros(len(sorting)), drawn["flip"]]),
        "blend": blend_coefficients(drawn),
        "hue": drawn["hue"],
        "hsv_to_rgb": HSV_TO_RGB,
        "sigma": drawn["sigma"][chosen["blur"]],
    }
    t = packed_to_device(arrays | chosen, images.device, dtype)
    x = images.index_select(0, t["image"].long()).transpose(1, 2)
    # memory in the order (N, H, 3, W), so that `separable` need not copy it
    x = x.to(dtype, memory_format=torch.contiguous_format)
    x = crop(x, t["start"], t["length"], t["flip"], size, border(drawn, *images.shape[2:]))
    color_jitter(x, hue_place[sorting], t, drawn["hue"].any())
    apply_at(t["grey"], x, luma)
    apply_at(t["blur"], x, blur, t["sigma"])
    apply_at(t["solarize"], x, solarize)
    return x.index_select(0, t["unsorting"].long())


def packed_to_device(arrays: dict[str, np.ndarray], device: torch.device, dtype) -> dict:
    """The arrays as tensors of `dtype`, copied at once; integers become floats, exact to 2^24."""
    packed = np.concatenate([values.ravel() for values in arrays.values()])
    packed = packed.astype(np.float64 if dtype == torch.float64 else np.float32)
    parts = to_device(packed, device).split([values.size for values in arrays.values()])
    pairs = zip(arrays.items(), parts, strict=True)
    return {name: part.view(values.shape) for (name, values), part in pairs}


def apply_at(indices: Tensor, x: Tensor, operation: Callable, *parameters: Tensor) -> None:
    """Replace the images x[indices] by operation(x[indices], *parameters), in place."""
    if len(indices):
        where = indices.long() if len(indices) < len(x) else slice(None)  # all: no gather
        x[where] = operation(x[where], *parameters)


def border(drawn: dict, height: int, width: int) -> int:
    """How many pixels the crops reach beyond the image at most."""
    bottom, right = drawn["top"] + drawn["h"] - height, drawn["left"] + drawn["w"] - width
    return max(0, *(int(x.max()) for x in (-drawn["top"], -drawn["left"], bottom, right)))


def crop(x: Tensor, start, length, flip, size: int, border: int) -> Tensor:
    """Crop, resize and mirror: (N, H, 3, W) in 0..255 -> (N, 3, size, size) in 0..1.

    start, length, flip   (2 N,), of the rows, then of the columns; see `resize_matrix`
    """
    n, height, _, width = x.shape
    matrix = resize_matrix(start, length, flip, max(height, width), size, border)
    rows, columns = matrix[:n, :, :height], matrix[n:, :, :width]
    return separable(x, rows / 255, columns).clamp_(0, 1)


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows x columns^T for each channel x: (B, H, 3, W), (B, h, H), (B, w, W) -> (B, 3, h, w)."""
    batch, height, channels, width = x.shape
    x = torch.bmm(x.reshape(batch, height * channels, width), columns.transpose(1, 2))
    x = torch.bmm(rows, x.view(batch, height, -1))
    return x.view(batch, x.shape[1], channels, -1).transpose(1, 2)


def resize_matrix(start, length, flip, full: int, size: int, border: int = 0) -> Tensor:
    """Crop, resize and mirror along one axis, as one matrix for each image: (N, size, full).

    Antialiased bicubic, as in torchvision's float `resized_crop(..., BICUBIC, antialias=True)`:
    Keys' cubic with a = -0.5, its window cut at the crop's edge and its weights normalized.

    start, length   (N,) first pixel and number of pixels of each crop
    flip            (N,) 1 where the result is mirrored, else 0
    border          how many pixels the crops may reach beyond the image, which is zero there
    """
    if border:
        padded = resize_matrix(start + border, length, flip, full + 2 * border, size)
        return padded[:, :, border : border + full]
    start, length, flip = (x[:, None, None] for x in (start, length, flip))
    like = dict(device=start.device, dtype=start.dtype)
    scale = length / size
    stretch = scale.clamp(min=1)  # of the kernel where the crop shrinks: the antialiasing
    i = torch.arange(size, **like)[None, :, None]
    i = (i - (size - 1) * flip).abs()  # size - 1 - i where mirrored
    center = scale * (i + 0.5)
    low = (center - 2 * stretch + 0.5).floor().clamp(min=0)
    high = torch.minimum((center + 2 * stretch + 0.5).floor(), length)
    # the crop's pixels from `low` on, for all crops as many as the largest window can have
    j = low + torch.arange(math.ceil(4 * max(1, full / size)) + 1, **like)
    weight = cubic((j - center + 0.5) / stretch) * (j < high)
    weight = weight / weight.sum(2, keepdim=True)
    pixel = (start + j).long().clamp_(max=full - 1)  # from `high` on, the weight is 0
    matrix = torch.zeros(len(start), size, full, **like)
    return matrix.scatter_add_(2, pixel, weight)


def cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic convolution kernel (1981), support -2..2."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def blend_coefficients(drawn: dict) -> np.ndarray:
    """`blend`'s coefficients at each place in the order, (4, 3, N); those of the hue are unused."""
    names, order = ("brightness", "contrast", "saturation"), drawn["order"].T
    by_operation = np.stack([*(drawn[name] for name in names), np.ones(order.shape[1])])
    factor = np.take_along_axis(by_operation, order, 0)
    rest = 1 - factor
    return np.stack([factor, rest * (order == SATURATION), rest * (order == CONTRAST)], 1)


def color_jitter(x: Tensor, hue_place: np.ndarray, t: dict[str, Tensor], any_hue: bool) -> None:
    """Brightness, contrast, saturation and hue in each image's order, in place.

    First the operations before the hue in each image's order, then the hue of all images together,
    then the operations after it.  Brightness, contrast and saturation differ only in `blend`'s
    coefficients, so one call does the operations that many images have at one place of the order.

    hue_place   (N,) 0..3, or -1 for no jitter; descending, so that `blend` works on slices
    """
    jittered = int((hue_place >= 0).sum())
    for place in range(3):
        before_hue = slice(int((hue_place > place).sum()))
        blend(x[before_hue], t["blend"][place, :, before_hue])
    if any_hue and jittered:
        adjust_hue(x[:jittered], t["hue"][:jittered], t["hsv_to_rgb"])
    for place in range(1, 4):
        after_hue = slice(int((hue_place >= place).sum()), jittered)
        blend(x[after_hue], t["blend"][place, :, after_hue])


def blend(x: Tensor, coefficients: Tensor) -> None:
    """f x + s luma(x) + c mean(luma(x)), clipped, in place; `coefficients` (3, N) are f, s, c.

    Brightness has (f, 0, 0), contrast (f, 0, 1 - f), saturation (f, 1 - f, 0), with f as drawn.
    """
    if len(x):
        f, s, c = coefficients[:, :, None, None, None]
        gray = luma(x)
        mean = gray.mean(dim=(1, 2, 3), keepdim=True)
        gray.mul_(s).add_(mean.mul_(c))
        torch.addcmul(gray, x, f, out=x).clamp_(0, 1)


def adjust_hue(x: Tensor, shift: Tensor, hsv_to_rgb: Tensor) -> None:
    """Add `shift` (N,) to the hue of HSV, in place: a fraction of the color circle, -0.5..0.5."""
    r, g, b = x.split(1, dim=1)
    high = torch.maximum(torch.maximum(r, g), b)
    spread = high - torch.minimum(torch.minimum(r, g), b)
    # the hue in sixths of the circle, at first times `spread`; 0 for gray
    h = torch.where(g == high, (b - r).add_(spread, alpha=2), (r - g).add_(spread, alpha=4))
    h = torch.where(r == high, g - b, h).div_(spread.clamp(min=1e-12))
    h = torch.remainder(h.add_(6 * shift[:, None, None, None]), 6)
    center, sign, offset = hsv_to_rgb[:, :, None, None]
    share = (h - center).abs_().mul_(sign).add_(offset).clamp_(0, 1)
    torch.sub(high, share.mul_(spread), out=x).clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    """Gray level of RGB images: (B, 3, H, W) -> (B, 1, H, W)."""
    r, g, b = x.split(1, dim=1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of square images, with reflected borders and 23 taps at 224 pixels (App. B)."""
    size, taps = x.shape[3], 2 * (x.shape[3] // 20) + 1
    offsets = torch.arange(taps, device=x.device) - taps // 2
    kernel = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = (torch.arange(size, device=x.device)[:, None] + offsets).abs()  # reflected on the left
    source = (size - 1) - (size - 1 - source).abs()  # and on the right
    matrix = torch.zeros(len(x), size, size, dtype=x.dtype, device=x.device)
    values = kernel[:, None, :].expand(-1, size, -1).contiguous()
    matrix.scatter_add_(2, source.expand(len(x), -1, -1), values)
    return separable(x.transpose(1, 2), matrix, matrix)


def solarize(x: Tensor) -> Tensor:
    """Invert what is at least 0.5."""
    return torch.where(x >= 0.5, 1 - x, x)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std for each channel, in the device's memory format; overwrites x."""
    x = x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
    return x.contiguous(memory_format=memory_format(x.device))
