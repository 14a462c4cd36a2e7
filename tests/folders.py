"""Folders of images for tests."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.errors import warn_once
from data import decode, folder
from data.datasets import DataConfig

SIZE = 16
CONFIG = DataConfig(dataset="folder", store_size=SIZE)


def picture(width=40, height=30, seed=0):
    """Smooth and asymmetric: neither a flip, a turn nor a swap of channels leaves it as it is."""
    y, x = np.mgrid[:height, :width]
    red, green = 20 + 200 * x / width, 20 + 200 * y / height
    blue = 120 + 100 * np.sin(x / width * 3 + seed) * np.cos(y / height * 2)
    return Image.fromarray(np.stack([red, green, blue], 2).astype(np.uint8))


def save(path, image, **keywords):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **keywords)


def pixels(path, size):
    return decode.decode(path, size)


def flat(path, value, mode="RGB", size=(20, 20)):
    save(path, Image.new(mode, size, value))


def packed(root, **changes):
    """The data set as a new process loads it."""
    warn_once.cache_clear()
    config = DataConfig(dataset="folder", **{"store_size": SIZE, **changes})
    folder.prepare(root, config)
    return folder.load(root, config)


def reds(images):
    return images.take(np.arange(len(images)))[:, 0, 0, 0].tolist()


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Images whose red is their number: train 10.., test 60.., unlabelled 90.."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "images"
    for n, name in enumerate(["cat/b.png", "cat/a.png", "ant/x/deep.png", "dog/c.PNG"]):
        flat(root / "train" / name, (10 + n, 0, 200))
    flat(root / "test" / "dog" / "d.png", (60, 0, 200))
    flat(root / "test" / "ant" / "e.png", (61, 0, 200))
    flat(root / "unlabelled" / "f.png", (90, 0, 200))
    flat(root / "unlabelled" / "more" / "g.png", (91, 0, 200))
    return root


@contextlib.contextmanager
def read_only(monkeypatch, root):
    """As root's rights don't have it: no folder can be made below `root`."""
    mkdir = Path.mkdir

    def refuse(path, *arguments, **keywords):
        if path.absolute().is_relative_to(root):
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        yield
