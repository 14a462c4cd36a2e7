"""See the augmentation: originals, both views, and each operation at its extremes, as one PNG.

python -m data.preview --recipe recipes/sample.toml

Written to preview.png or --out; a file that exists is not replaced.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from core import options
from core.errors import one_line_errors
from core.files import new_file
from core.options import make_config, parse, running
from data import datasets
from data.decode import SOFTWARE
from data.loader import VIEWS, generator
from data.views import View2Config, ViewConfig, apply, draw

OPERATIONS = ("brightness", "contrast", "saturation", "hue")


@dataclass(kw_only=True)
class Config(options.Config):
    """The settings of a preview."""

    data: datasets.PretrainData
    view1: ViewConfig
    view2: View2Config
    count: int = running(8, "images shown", low=1)
    out: str = running("preview.png", "file to write")
    seed: int = running(0, "seed of the images and views", low=0, high=2**63 - 1)
    quiet: bool = running(False, "print errors only")


def configure(argv: list[str]) -> Config:
    """The recipe's data and views."""
    config = make_config(Config, parse(Config, argv, __doc__))
    new_file(config.out)
    return config


def run(config) -> dict:
    """Write the picture; returns the names of its columns."""
    data = datasets.load(config.data)
    images, _ = data.pretraining(config.data.pretrain_on)
    rng, crop = generator(config.seed, VIEWS, 0), config.data.crop_size
    chosen = np.sort(rng.choice(len(images), min(config.count, len(images)), replace=False))
    pixels = images.gather(chosen)
    columns = {"original": pixels.float() / 255}
    for name in ("view1", "view2"):
        view = getattr(config, name)
        drawn = draw(view, len(pixels), *images.shape, rng)
        columns[name] = apply(pixels, view, drawn, view.size or crop)
    columns |= extremes(pixels, [config.view1, config.view2], crop)
    rows = [[x[i] for x in columns.values()] for i in range(len(pixels))]
    save_png(mosaic(rows, list(columns)), config.out)
    if not config.quiet:
        print(f"{config.out}: {len(rows)} images, {len(columns)} columns")
    return {"columns": list(columns)}


def extremes(pixels: Tensor, views: list[ViewConfig], crop: int) -> dict[str, Tensor]:
    """Each operation that `views` can draw, alone, at both ends of its range: name -> images."""
    count, height, width = len(pixels), *pixels.shape[2:]
    whole = ViewConfig.supervised([1.0, 1.0], 0, 0.0)
    still = draw(whole, count, height, width, np.random.default_rng(0))
    still |= {name: np.full(count, float(name != "hue")) for name in OPERATIONS}
    found = {}

    def add(name: str, view: ViewConfig, **changed) -> None:
        now = still | {k: np.full(count, v) for k, v in changed.items()}
        found.setdefault(name, apply(pixels, view, now, view.size or crop))

    for view in views:
        ends = [(f"crop {100 * share:.0f} %", share, 1.0) for share in view.area]
        ends += [(f"aspect {ratio:.2g}", 0.5, ratio) for ratio in view.aspect if ratio != 1]
        for name, share, ratio in ends:
            h = min(height, max(1, round((height * width * share / ratio) ** 0.5)))
            w = min(width, max(1, round((height * width * share * ratio) ** 0.5)))
            add(name, view, h=h, w=w, top=(height - h) // 2, left=(width - w) // 2)
        if view.shift:
            add(f"shift {view.shift} px", view, top=-view.shift, left=-view.shift)
        if view.flip_p:
            add("flip", view, flip=True)
        for name in OPERATIONS if view.jitter_p else ():
            strength = getattr(view, name)
            middle = 0 if name == "hue" else 1
            for value in (middle - strength, middle + strength) if strength else ():
                add(f"{name} {value:.2g}", view, jitter=True, **{name: value})
        if view.grey_p:
            add("grey", view, grey=True)
        for sigma in view.blur_sigma if view.blur_p else ():
            add(f"blur {sigma:g} px", view, blur=True, sigma=float(sigma))
        if view.solarize_p:
            add("solarize", view, solarize=True)
    return found


def save_png(image: Image.Image, path) -> None:
    """Write a PNG file marked as ours, which no folder data set takes for data."""
    marks = PngInfo()
    marks.add_text("Software", SOFTWARE)
    image.save(path, "png", pnginfo=marks)


def mosaic(rows: list[list[Tensor]], heads: list[str] = (), side: int = 96) -> Image.Image:
    """Images (3, h, w) in 0..1 in a grid of tiles `side` pixels wide, names on top."""
    gap, top = 4, 20 * bool(heads)
    across = max(map(len, rows))
    size = (across * (side + gap) + gap, len(rows) * (side + gap) + gap + top)
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for column, text in enumerate(heads):
        pen.text((gap + column * (side + gap), gap), text, fill="black", font=font)
    for number, row in enumerate(rows):
        for column, pixels in enumerate(row):
            tile = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
            how = Image.Resampling.NEAREST if len(tile) < side else Image.Resampling.BICUBIC
            tile = Image.fromarray(tile).resize((side, side), how)
            canvas.paste(tile, (gap + column * (side + gap), top + gap + number * (side + gap)))
    return canvas


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    with one_line_errors():
        config = configure(sys.argv[1:] if argv is None else argv)
        datasets.prepare(config.data)
        return run(config)


if __name__ == "__main__":
    main()
