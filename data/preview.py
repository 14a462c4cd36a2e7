"""Write a PNG that shows the augmentation: images, and several draws of each view.

python -m data.preview --recipe recipes/sample.toml

The file is preview.png or --out; an existing one is not replaced.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.utils import make_grid

from core import options
from core.errors import one_line_errors
from core.files import new_file
from core.options import make_config, parse, running
from data import datasets
from data.decode import SOFTWARE
from data.loader import VIEWS, generator
from data.views import View2Config, ViewConfig, apply, draw

DRAWS = 4  # of each view


@dataclass(kw_only=True)
class Config(options.Config):
    """The settings of a preview."""

    data: datasets.PretrainData
    view1: ViewConfig
    view2: View2Config
    count: int = running(8, "number of images", low=1)
    out: str = running("preview.png", "PNG file to write")
    seed: int = running(0, "seed of the images shown and of their views", low=0, high=2**63 - 1)
    quiet: bool = running(False, "print errors only")


def configure(argv: list[str]) -> Config:
    """The settings that `argv` asks for."""
    config = make_config(Config, parse(Config, argv, __doc__))
    new_file(config.out)
    return config


def run(config) -> dict:
    """Write the picture and return the names of its columns."""
    data = datasets.load(config.data)
    images, _ = data.pretraining(config.data.pretrain_on)
    rng = generator(config.seed, VIEWS, 0)
    chosen = np.sort(rng.choice(len(images), min(config.count, len(images)), replace=False))
    pixels = images.take(chosen)
    names, columns = ["original"], [pixels.float() / 255]
    for name in ("view1", "view2"):
        view = getattr(config, name)
        for _ in range(DRAWS):
            drawn = draw(view, len(pixels), *images.shape, rng)
            columns.append(apply(pixels, drawn, view.size or config.data.crop_size))
            names.append(name)
    save_png(mosaic(list(zip(*columns, strict=True)), names), config.out)
    if not config.quiet:
        print(f"{config.out}: {len(pixels)} images, {DRAWS} draws of each view")
    return {"columns": names}


def save_png(image: Image.Image, path) -> None:
    """Write a PNG file that a folder data set recognizes as ours and leaves out."""
    marks = PngInfo()
    marks.add_text("Software", SOFTWARE)
    image.save(path, "png", pnginfo=marks)


def mosaic(rows: Sequence[Sequence[Tensor]], heads: Sequence[str], side: int = 96) -> Image.Image:
    """Grid of images (3, h, w) in 0..1, resized to `side` pixels, with `heads` above its columns.

    All rows have the same number of images.
    """
    gap, top = 4, 20
    tiles = [interpolate(image[None], side, mode="area")[0] for row in rows for image in row]
    grid = make_grid(tiles, nrow=len(rows[0]), padding=gap, pad_value=1.0)
    grid = pad(grid.clamp(0, 1), (0, 0, top, 0), value=1.0)
    canvas = Image.fromarray((grid * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=11)
    for column, text in enumerate(heads):
        pen.text((gap + column * (side + gap), gap), text, fill="black", font=font)
    return canvas


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    with one_line_errors():
        config = configure(sys.argv[1:] if argv is None else argv)
        datasets.prepare(config.data)
        return run(config)


if __name__ == "__main__":
    main()
