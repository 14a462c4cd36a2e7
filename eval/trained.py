"""A pretrained encoder or a classifier outside its run: loaded, and given a user's images."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from byol.networks import ENCODERS, EncoderConfig, build_encoder
from data import folder
from data.images import Images
from eval.classifiers import Classifier, build_head
from eval.features import FrozenEncoder
from training.checkpoints import load_file
from training.command import one_line_errors
from training.config import Parser, UserError
from training.distributed import Processes, pick_device
from training.weights import IMAGENET_MEAN, IMAGENET_STD, Weights, read_weights


def parser(description: str, device: bool = True) -> Parser:
    """With --ckpt and --device, which commands on a trained network have."""
    found = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--ckpt", required=True, metavar="RUN", help="run folder or weights")
    if device:
        found.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return found


def command(run, arguments: Parser, argv: list[str] | None = None):
    """`run` on the parsed command line; wrong input is one line on stderr."""
    with one_line_errors():
        given = arguments.parse_args(argv)
        if getattr(given, "top", 1) < 1:
            raise UserError(f"--top {given.top}: must be at least 1")
        return run(given)


def new_file(path: str | Path, flag: str = "--out") -> Path:
    """UserError unless a file can be written there without losing one."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{flag} {path}: exists; name another file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: no folder {path.absolute().parent}; make it first")
    return path


def load_encoder(weights: Weights, source: str, device: str) -> tuple[FrozenEncoder, int]:
    """The encoder with its normalisation and evaluation geometry; the side its images come in.

    Weights that say nothing of themselves are taken for torchvision's of ImageNet.
    """
    meta = weights.meta
    config = EncoderConfig(**weights.tables()[0]["encoder"])
    if config.arch not in ENCODERS:
        raise UserError(f"{source}: made with --arch {config.arch}, which this code does not have")
    encoder = build_encoder(config)
    weights.load_into(encoder, config, source)
    frame = (0, 0) if "crop_size" in meta else (256, 224)
    mean, std = meta.get("mean", IMAGENET_MEAN), meta.get("std", IMAGENET_STD)
    processes = Processes(0, 1, torch.device(pick_device(device)))
    sizes = tuple(meta.get("frame", frame))
    side = meta.get("stored", meta.get("crop_size", 256))
    return FrozenEncoder(encoder.eval(), mean, std, sizes, processes), side


def load_classifier(ckpt: str, device: str):
    """(frozen encoder, Classifier, class names, side of its images) of a classifier.pt.

    ckpt   the file, its folder, or a pretraining run that was evaluated
    """
    path = _classifier_of(Path(ckpt))
    saved = load_file(path, "--ckpt")
    if not (isinstance(saved, dict) and {"encoder", "head", "classes"} <= saved.keys()):
        raise UserError(f"--ckpt {path}: holds no classifier; name a run of linear_eval.py")
    frozen, side = load_encoder(read_weights(path), f"--ckpt {path}", device)
    head, width = build_head(saved["head"]), frozen.encoder.feature_size
    mean = saved.get("feature_mean", torch.zeros(width))
    std = saved.get("feature_std", torch.ones(width))
    return frozen, Classifier(mean, std, head), saved["classes"], side


def _classifier_of(path: Path) -> Path:
    """The one classifier.pt that is meant; a run's linear one before others."""
    if path.is_file():
        return path
    found = [path / "classifier.pt"]
    if not found[0].exists():
        found = sorted(path.glob("*/classifier.pt"))
        found = [p for p in found if p.parent.name == "linear"] or found
    if len(found) == 1:
        return found[0]
    if not found:
        raise UserError(f"--ckpt {path}: no classifier.pt there; train one with linear_eval.py")
    raise UserError(f"--ckpt {path}: several classifiers, name one: {', '.join(map(str, found))}")


def read_images(words: list[str], side: int) -> tuple[Images, list[str]]:
    """Images of files and of all files below folders, and their names.

    As the folder data set packs them: upright, short side `side`, centre square.  What can't be
    read is left out with a warning.
    """
    paths = []
    for path in map(Path, words):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; name images, or folders of them")
        paths += [path / name for name in folder.image_files(path)] if path.is_dir() else [path]
    pixels, names = np.empty((len(paths), 3, side, side), np.uint8), []
    for path, found in zip(paths, folder.decode_all(paths, side), strict=True):
        if isinstance(found, str):
            if found == folder.OURS:
                continue
            print(f"warning: {path}: left out, not readable ({found})", file=sys.stderr)
        else:
            pixels[len(names)] = found.pixels
            names.append(str(path))
    if not names:
        raise UserError(f"{' '.join(words)}: no readable image there; name files or folders")
    return Images([pixels[: len(names)]]), names
