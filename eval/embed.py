"""Features of a whole data set, for other tools: one .npz with labels and file names.

python -m eval.embed --ckpt runs/byol-mine --dataset folder --data-root DIR --out features.npz

It holds features (N, D) float32, labels (-1: unknown), files, splits and classes.
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.files import new_file, write_atomically
from core.options import parse
from data import datasets
from eval.frozen import FrozenEncoder
from eval.trained import CkptConfig, ckpt_config, from_config, prepare
from training.command import execute
from training.config import RunConfig
from training.run_folder import say


@dataclass(kw_only=True)
class Config(CkptConfig):
    """The settings of an export of features."""

    run: RunConfig


def configure(argv: list[str]) -> Config:
    """Data set, sizes and encoder come from --ckpt unless flags say otherwise."""
    config = ckpt_config(Config, parse(Config, argv, __doc__))
    config.run.out = str(new_file(config.run.out or "features.npz"))
    return config


def run(config, processes) -> dict:
    """Write `features` (N, D) float32, `labels` (-1: unknown), `files`, `splits`, `classes`."""
    data = datasets.load(config.data)
    splits = {s: getattr(data, s) for s in ("train", "unlabelled", "test")}
    splits = {name: images for name, images in splits.items() if images is not None}
    frozen = FrozenEncoder(*from_config(config, next(iter(splits.values()))), processes)
    arrays = {"files": [], "splits": [], "labels": [], "features": []}
    for name, images in splits.items():  # first: another start may pack the folder anew meanwhile
        arrays["files"] += datasets.file_names(config.data, name, len(images))
    for name, images in splits.items():
        labels = getattr(data, f"{name}_labels", None)
        arrays["splits"] += [name] * len(images)
        arrays["labels"].append(np.full(len(images), -1) if labels is None else labels)
        arrays["features"].append(frozen(images))
    for name in ("features", "labels"):
        arrays[name] = np.concatenate(arrays[name])
    if processes.main:
        file = io.BytesIO()
        np.savez(file, classes=np.array(data.class_names), **arrays)
        write_atomically(Path(config.run.out), file.getvalue())
    say(processes, f"{config.run.out}: features {arrays['features'].shape}")
    return {"images": len(arrays["labels"])}


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, prepare, argv)


if __name__ == "__main__":
    main()
