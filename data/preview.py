"""See the augmentation: originals, both views, and each operation at its extremes, as one PNG.

python -m data.preview --recipe recipes/sample.toml

Written to preview.png or --out; a file that exists is not replaced.
"""

import sys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from core.errors import UserError, one_line_errors
from core.files import new_file
from core.options import RunConfig, read_config
from data import datasets
from data.decode import SOFTWARE
from data.loader import VIEWS, generator
from data.views import View2Config, ViewConfig, apply, draw

OPERATIONS = ("brightness", "contrast", "saturation", "hue")


def configure(argv: list[str]):
    """The recipe's data and views."""
    sections = dict(data=datasets.DataConfig, view1=ViewConfig, view2=View2Config, run=RunConfig)
    images = (("--count",), dict(type=int, default=8, metavar="N", help="images shown [8]"))
    hide = tuple(f for f in RunConfig.__dataclass_fields__ if f not in ("out", "seed", "quiet"))
    config = read_config(argv, sections, description=__doc__, extra=(images,), hide=hide)
    if config.count < 1:
        raise UserError(f"--count {config.count}: must be at least 1")
    config.run.out = str(new_file(config.run.out or "preview.png"))
    return config


def run(config) -> dict:
    """Write the picture; returns the names of its columns."""
    data = datasets.load(config.data)
    images, _ = data.pretraining(config.data.pretrain_on)
    rng, crop = generator(config.run.seed, VIEWS, 0), config.data.crop_size
    chosen = np.sort(rng.choice(len(images), min(config.count, len(images)), replace=False))
    pixels = images.gather(chosen)
    columns = {"original": pixels.float() / 255}
    for name in ("view1", "view2"):
        view = getattr(config, name)
        drawn = draw(view, len(pixels), *images.shape, rng)
        columns[name] = apply(pixels, view, drawn, view.size or crop)
    columns |= extremes(pixels, [config.view1, config.view2], crop)
    rows = [[x[i] for x in columns.values()] for i in range(len(pixels))]
    save_png(mosaic(rows, list(columns)), config.run.out)
    if not config.run.quiet:
        print(f"{config.run.out}: {len(rows)} images, {len(columns)} columns")
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
