"""The random views of BYOL (App. B, Table 6), drawn for each image, applied to a whole batch.

`draw` chooses every random number of a batch on the CPU; `apply` turns images into views by them.
Each operation gives what torchvision.transforms.v2.functional gives on float images.
"""

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
HSV_TO_RGB = np.array([[3.0, 2.0, 4.0], [-1.0, 1.0, 1.0], [2.0, -1.0, -1.0]])
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # in the order of a jitter


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


def apply(images: Tensor, drawn: dict, size: int, dtype=torch.float32) -> Tensor:
    """Views of uint8 images (B, 3, H, W) by what `draw` drew: (N, 3, size, size) in 0..1.

    drawn   numbers of N = V * B views: those at n are for a view of image n % B
    """
    # Images are sorted by the place of the hue in their jitter, see color_jitter.
    hue_place = np.where(drawn["jitter"], (drawn["order"] == HUE).argmax(1), -1)
    sorting = np.argsort(-hue_place, kind="stable")
    drawn = {name: values[sorting] for name, values in drawn.items()}
    chosen = {name: np.flatnonzero(drawn[name]) for name in ("grey", "blur", "solarize")}
    numbers = {
        "image": sorting % len(images),
        "back": np.argsort(sorting),
        "start": np.concatenate([drawn["top"], drawn["left"]]),
        "length": np.concatenate([drawn["h"], drawn["w"]]),
        "flip": np.concatenate([np.zeros(len(sorting)), drawn["flip"]]),
        "blend": blend_factors(drawn),
        "hue": drawn["hue"],
        "sigma": drawn["sigma"][chosen["blur"]],
        "hsv_to_rgb": HSV_TO_RGB,
    }
    t = send(numbers | chosen, images.device, dtype)
    # memory in the order (N, H, 3, W): both products of the crop are then plain ones
    x = images.index_select(0, t["image"].long()).transpose(1, 2)
    x = x.to(dtype, memory_format=torch.contiguous_format)
    x = crop(x, t["start"], t["length"], t["flip"], size, border(drawn, *images.shape[2:]))
    color_jitter(x, hue_place[sorting], t, drawn["hue"].any())
    change(x, t["grey"], luma)
    change(x, t["blur"], blur, t["sigma"])
    change(x, t["solarize"], solarize)
    return x.index_select(0, t["back"].long())


def send(arrays: dict[str, np.ndarray], device: torch.device, dtype) -> dict[str, Tensor]:
    """The arrays as tensors of `dtype`, by one copy; integers stay exact below 2^24."""
    packed = np.concatenate([values.ravel() for values in arrays.values()])
    packed = packed.astype(np.float64 if dtype == torch.float64 else np.float32)
    parts = to_device(packed, device).split([values.size for values in arrays.values()])
    shapes = zip(arrays.items(), parts, strict=True)
    return {name: part.view(values.shape) for (name, values), part in shapes}


def change(x: Tensor, chosen: Tensor, operation: Callable, *parameters: Tensor) -> None:
    """Replace the images at the indices `chosen` by operation(images, *parameters), in place."""
    if len(chosen):
        where = chosen.long() if len(chosen) < len(x) else slice(None)
        x[where] = operation(x[where], *parameters)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std for each channel, in place, in channels-last memory."""
    x = x.sub_(mean.view(3, 1, 1)).div_(std.view(3, 1, 1))
    return x.contiguous(memory_format=torch.channels_last)


def border(drawn: dict, height: int, width: int) -> int:
    """How many pixels beyond the image the furthest crop reaches."""
    bottom, right = drawn["top"] + drawn["h"] - height, drawn["left"] + drawn["w"] - width
    return max(0, *(int(x.max()) for x in (-drawn["top"], -drawn["left"], bottom, right)))


def crop(x: Tensor, start, length, flip, size: int, border: int) -> Tensor:
    """Crop, resize and mirror: (N, H, 3, W) in 0..255 -> (N, 3, size, size) in 0..1.

    start, length, flip   of the rows, then of the columns, (2 N,) each; see `resize_matrix`
    """
    n, height, _, width = x.shape
    matrix = resize_matrix(start, length, flip, max(height, width), size, border)
    rows, columns = matrix[:n, :, :height], matrix[n:, :, :width]
    return separable(x, rows / 255, columns).clamp_(0, 1)


def separable(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply each image by its row and column matrices: (B, H, 3, W) -> (B, 3, h, w)."""
    batch, height, channels, width = x.shape
    x = torch.bmm(x.reshape(batch, height * channels, width), columns.transpose(1, 2))
    x = torch.bmm(rows, x.view(batch, height, -1))
    return x.view(batch, x.shape[1], channels, -1).transpose(1, 2)


def resize_matrix(start, length, flip, full: int, size: int, border: int = 0) -> Tensor:
    """Crop and antialiased bicubic resize along one axis, a (size, full) matrix for each image.

    Keys' cubic with a = -0.5; the window is cut at the crop's edge and its weights normalized, as
    in torchvision's float `resized_crop(..., BICUBIC, antialias=True)`.  The crop may reach
    `border` pixels beyond the image, where it is zero.  Where `flip` is 1, the result is mirrored.
    """
    if border:
        padded = resize_matrix(start + border, length, flip, full + 2 * border, size)
        return padded[:, :, border : border + full]
    start, length, flip = (x[:, None, None] for x in (start, length, flip))
    like = dict(device=start.device, dtype=start.dtype)
    scale = length / size
    stretch = scale.clamp(min=1)
    i = torch.arange(size, **like)[None, :, None]
    i = (i - (size - 1) * flip).abs()
    center = scale * (i + 0.5)
    low = (center - 2 * stretch + 0.5).floor().clamp(min=0)
    high = torch.minimum((center + 2 * stretch + 0.5).floor(), length)
    # the few pixels that count, at most so many for crops of any length
    j = low + torch.arange(math.ceil(4 * max(1, full / size)) + 1, **like)
    weight = cubic((j - center + 0.5) / stretch) * (j < high)
    weight = weight / weight.sum(2, keepdim=True)
    pixel = (j + start).long().clamp_(max=full - 1)
    matrix = torch.zeros(len(start), size, full, **like)
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
    kernel = torch.exp(-0.5 * (offsets.to(x.dtype) / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    source = torch.arange(size, device=x.device)[:, None] + offsets
    source = source.abs()  # reflect on the left, then on the right
    source = (size - 1) - (size - 1 - source).abs()
    matrix = torch.zeros(len(x), size, size, dtype=x.dtype, device=x.device)
    values = kernel[:, None, :].expand(-1, size, -1).contiguous()
    matrix.scatter_add_(2, source.expand(len(x), -1, -1), values)
    return separable(x.transpose(1, 2), matrix, matrix)


def blend_factors(drawn: dict) -> np.ndarray:
    """What `blend` needs at each place in an image's order of color operations: (4, 3, N)."""
    names, order = ("brightness", "contrast", "saturation"), drawn["order"].T
    by_operation = np.stack([*(drawn[name] for name in names), np.ones(order.shape[1])])
    factor = np.take_along_axis(by_operation, order, 0)
    rest = 1 - factor
    return np.stack([factor, rest * (order == SATURATION), rest * (order == CONTRAST)], 1)


def color_jitter(x: Tensor, hue_place: np.ndarray, t: dict[str, Tensor], turn: bool) -> None:
    """Brightness, contrast, saturation and hue in each image's own order, in place.

    The hues of all images are turned at once.  What comes before the hue in an image's order is
    done before that, the rest after it.

    hue_place   (N,) 0..3, falling, so that each of these works on a slice; -1: no jitter
    turn        whether any hue changes
    """
    jittered = int((hue_place >= 0).sum())
    for k in range(3):
        early = int((hue_place > k).sum())
        blend(x[:early], t["blend"][k, :, :early])
    if turn and jittered:
        hue(x[:jittered], t["hue"][:jittered], t["hsv_to_rgb"])
    for k in range(1, 4):
        late = slice(int((hue_place >= k).sum()), jittered)
        blend(x[late], t["blend"][k, :, late])


def blend(x: Tensor, factors: Tensor) -> None:
    """f x + s luma + c mean luma, clipped, in place; `factors` (3, N) has f, s, c of each image.

    Brightness has (f, 0, 0), contrast (f, 0, 1 - f), saturation (f, 1 - f, 0).
    """
    if len(x):
        f, s, c = factors[:, :, None, None, None]
        gray = luma(x)
        mean = gray.mean(dim=(1, 2, 3), keepdim=True)
        gray.mul_(s).add_(mean.mul_(c))
        torch.addcmul(gray, x, f, out=x).clamp_(0, 1)


def hue(x: Tensor, shift: Tensor, hsv_to_rgb: Tensor) -> None:
    """Turn the hue of HSV by `shift` (N,) of a full circle (-0.5..0.5), in place."""
    r, g, b = x.split(1, dim=1)
    high = torch.maximum(torch.maximum(r, g), b)
    spread = high - torch.minimum(torch.minimum(r, g), b)
    # times `spread`, in sixths of the circle; where there is no color it is 0
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


def solarize(x: Tensor) -> Tensor:
    """Invert what is at least 0.5."""
    return torch.where(x >= 0.5, 1 - x, x)
