"""Write the features of a whole data set, with labels and file names, into one .npz.

python -m eval.embed --ckpt runs/byol-mine --dataset folder --data-root DIR --out features.npz

--out is the file to write [features.npz].  Arrays: features (N, D) float32; labels (-1: unknown),
files and splits, (N,) each; classes.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.files import new_file, write_atomically
from core.options import parse
from data import datasets
from eval.trained import CkptConfig, FrozenEncoder, ckpt_config, from_config, prepare
from training.command import execute
from training.config import RunConfig
from training.run_folder import say


@dataclass(kw_only=True)
class Config(CkptConfig):
    """Settings of an export of features."""

    run: RunConfig


def configure(argv: list[str]) -> Config:
    """The settings from the command line; data set, sizes and encoder default to --ckpt's."""
    config = ckpt_config(Config, parse(Config, argv, __doc__))
    config.run.out = str(new_file(config.run.out or "features.npz"))
    return config


def run(config, processes) -> dict:
    """Write the features of every image of the data set; returns {"images": their number}."""
    data = datasets.load(config.data)
    splits = {"train": data.train, "unlabelled": data.unlabelled, "test": data.test}
    splits = {name: images for name, images in splits.items() if images is not None}
    files, split_of, labels = [], [], []
    for name, images in splits.items():
        files += data.files[name] if data.files else [f"{name}/{i}" for i in range(len(images))]
        split_of += [name] * len(images)
        known = getattr(data, f"{name}_labels", None)
        labels.append(np.full(len(images), -1) if known is None else known)
    frozen = FrozenEncoder(*from_config(config, next(iter(splits.values()))), processes)
    features = np.concatenate([frozen(images) for images in splits.values()])
    if processes.main:
        arrays = dict(features=features, labels=np.concatenate(labels), files=files)
        file = io.BytesIO()
        np.savez(file, splits=split_of, classes=data.class_names, **arrays)
        write_atomically(Path(config.run.out), file.getvalue())
    say(processes, f"{config.run.out}: features {features.shape}")
    return {"images": len(features)}


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, prepare, argv)


if __name__ == "__main__":
    main()
