"""Load a frozen encoder or a classifier from --ckpt, and the user's own images."""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from core.device import memory_format, pick_device
from core.errors import UserError, one_line_errors, printable
from core.options import Config, Parser, make_config, option, options_of
from data import datasets
from data.decode import OURS, decode_all
from data.images import Images
from data.labelled import Labelled
from data.listing import image_files
from data.transform import EvalTransform
from eval.classifiers import Classifier, build_head
from eval.features import extract
from training.config import LoopRun
from training.distributed import SINGLE, Processes
from training.encoder import ENCODERS, EncoderConfig, ShapeConfig, check_sizes
from training.run_folder import UNTIL
from training.weights import Weights, load_file, published_inputs, read_weights


def load(ckpt: str | Path, device: str = "cpu") -> tuple[nn.Module, EvalTransform]:
    """The encoder of a run folder or file, in eval mode on `device`, and its inputs' transform.

        encoder, transform = load("runs/byol-mine")
        features = encoder(transform(image))  # (1, D)

    `image` is a PIL image, or uint8 (3, H, W) or (B, 3, H, W) as its data set stores them.
    A file without metadata is read as torchvision's ImageNet weights.
    """
    return from_weights(read_weights(ckpt), f"--ckpt {ckpt}", device)


def from_weights(weights: Weights, source: str, device: str) -> tuple[nn.Module, EvalTransform]:
    """`load` for weights that have been read; error messages call them `source`."""
    config = EncoderConfig(**inherited_tables(weights)[0]["encoder"])
    if config.arch not in ENCODERS:
        raise UserError(f"{source}: made with --arch {config.arch}, which this code does not have")
    encoder = weights.encoder(config, source).eval().requires_grad_(False)
    device = torch.device(pick_device(device))
    encoder.to(device, memory_format=memory_format(device))
    missing = published_inputs(EncoderConfig.arch)  # of a file without metadata
    if "crop_size" in weights.meta:  # our own file: without a `frame` in it, nothing is cropped
        missing = {k: missing[k] for k in ("mean", "std")}
    return encoder, EvalTransform.from_meta(missing | weights.meta)


@dataclass
class FrozenEncoder:
    """An encoder on its device, with its transform; maps Images to features (N, feature_size)."""

    encoder: nn.Module
    transform: EvalTransform
    processes: Processes = SINGLE

    def __post_init__(self) -> None:
        self.encoder.to(self.processes.device, memory_format=memory_format(self.processes.device))

    def __call__(self, images: Images) -> Tensor:
        return extract(self.encoder, images, self.transform, self.processes)


def load_frozen(ckpt: str | Path, device: str) -> FrozenEncoder:
    """The FrozenEncoder of a run folder or file, see `load`."""
    return FrozenEncoder(*load(ckpt), Processes(0, 1, torch.device(pick_device(device))))


class Features:
    """Maps Labelled to features (N, D); calls `extract` only once for the same Images.

    dataset   if set, features of all its train images are computed once and parts selected
    """

    def __init__(self, extract, dataset=None) -> None:
        self.extract, self.dataset = cache(extract), dataset

    def __call__(self, labelled: Labelled) -> Tensor:
        if self.dataset is None or labelled.index is None:
            return self.extract(labelled.images)
        return self.extract(self.dataset.train)[labelled.index]


def load_classifier(ckpt: str, device: str) -> tuple[FrozenEncoder, Classifier, list[str]]:
    """(frozen encoder, Classifier, class names) from a classifier.pt.

    ckpt   the file, its folder, or a pretraining run with an evaluation in it
    """
    path = classifier_file(Path(ckpt))
    saved = load_file(path, "--ckpt")
    if not (isinstance(saved, dict) and {"encoder", "head", "classes"} <= saved.keys()):
        raise UserError(f"--ckpt {path}: holds no classifier; name a run of linear_eval.py")
    frozen = load_frozen(path, device)
    head, width = build_head(saved["head"]), frozen.encoder.feature_size
    mean = saved.get("feature_mean", torch.zeros(width))
    std = saved.get("feature_std", torch.ones(width))
    return frozen, Classifier(mean, std, head), saved["classes"]


def classifier_file(path: Path) -> Path:
    """The classifier.pt at `path`; in a pretraining run, the one in linear/ or the only one."""
    for file in (path, path / "classifier.pt", path / "linear" / "classifier.pt"):
        if file.is_file():
            return file
    files = [p for p in sorted(path.glob("*/classifier.pt")) if UNTIL not in p.parent.name]
    if not files:
        raise UserError(f"--ckpt {path}: no classifier.pt there; train one with linear_eval.py")
    if len(files) > 1:
        names = ", ".join(map(str, files))
        raise UserError(f"--ckpt {path}: several classifiers, name one: {names}")
    return files[0]


def read_images(words: list[str], side: int) -> tuple[Images, list[str]]:
    """The images in files and folders, searched recursively, and their paths.

    Prepared as in the folder data set: upright, short side `side`, center square.  A file that
    can't be decoded is left out with a warning.
    """
    paths = []
    for path in map(Path, words):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; name images, or folders of them")
        paths += [path / name for name in image_files(path)] if path.is_dir() else [path]
    pixels, names = np.empty((len(paths), 3, side, side), np.uint8), []
    for path, decoded in zip(paths, decode_all(paths, side), strict=True):
        if not isinstance(decoded, str):
            pixels[len(names)] = decoded
            names.append(str(path))
        elif decoded != OURS:
            name = printable(str(path))
            print(f"warning: {name}: left out, not readable ({decoded})", file=sys.stderr)
    if not names:
        raise UserError(f"{' '.join(words)}: no readable image there; name files or folders")
    return Images([pixels[: len(names)]]), names


def parser(description: str, device: bool = True) -> Parser:
    """A parser with --ckpt and, unless `device` is False, --device."""
    arguments = Parser(description)
    arguments.add_argument("--ckpt", required=True, metavar="RUN", help="run folder or file")
    if device:
        text = options_of(LoopRun)["device"].field.metadata["help"]
        arguments.add_argument("--device", default="auto", type=pick_device, help=text)
    return arguments


def command(run, arguments: Parser, argv: list[str] | None = None):
    """Return `run(args)` of the parsed command line; an expected failure is one line on stderr."""
    with one_line_errors():
        args = arguments.parse_args(argv)
        if getattr(args, "top", 1) < 1:
            raise UserError(f"--top {args.top}: must be at least 1")
        return run(args)


@dataclass(kw_only=True)
class CkptConfig(Config):
    """Settings of a script that takes a pretrained encoder."""

    data: datasets.DataConfig
    encoder: ShapeConfig
    ckpt: str = option(
        "", "run folder, checkpoint or encoder.pt; bare weights need --arch, --stem, --width"
    )
    weights: Weights | None = None  # read from --ckpt


def ckpt_config(config_class: type[CkptConfig], typed: dict) -> CkptConfig:
    """`make_config` whose defaults are the settings of the run of --ckpt."""
    if not typed.get("ckpt"):
        raise UserError("--ckpt is missing: name a run folder, or a file of weights")
    typed = typed | {"ckpt": str(Path(typed["ckpt"]))}  # a resume may or may not have a slash
    weights = read_weights(typed["ckpt"])
    run, recipe = inherited_tables(weights)
    other = typed.get("data.dataset", "folder") != "folder"
    if other and run["data"].get("dataset") == "folder" and "recipe" not in typed:
        typed = {"data.data_root": datasets.DataConfig.data_root} | typed  # not among the images
    config = make_config(config_class, typed, run=run, recipe=recipe)
    config.weights = weights
    init = weights.meta.get("init", EncoderConfig.init)
    config.encoder = EncoderConfig(**vars(config.encoder), init=init)
    return config


def prepare(config: CkptConfig) -> None:
    """Download the data set if it is missing."""
    datasets.prepare(config.data)


def from_config(config: CkptConfig, images: Images) -> tuple[nn.Module, EvalTransform]:
    """The encoder of --ckpt, and the EvalTransform of `images` by the settings in [data]."""
    encoder = config.weights.encoder(config.encoder, f"--ckpt {config.ckpt}")
    normalization = config.weights.normalization(images)
    transform = EvalTransform.of(config.data, images.shape, *normalization)
    check_sizes(encoder, transform, [config.data.crop_size])
    return encoder, transform


def inherited_tables(weights: Weights) -> tuple[dict, dict]:
    """Settings that an evaluation inherits: the run's data and encoder; its recipe's tables.

    Options of the recipe's [run] that belong to the run itself, such as `out`, are left out.
    """
    data, options = weights.config.get("data", {}), options_of(datasets.DataConfig).keys()
    if not data and "crop_size" in weights.meta:  # a file without its run
        data = {"crop_size": weights.meta["crop_size"]}
    data = {name: data[name] for name in options & data.keys() - {"download"}}
    shape = {name: weights.meta[name] for name in options_of(ShapeConfig) if name in weights.meta}
    recipe = dict(weights.config.get("recipe", {}))
    if "run" in recipe:
        shared = options_of(LoopRun).keys() - {"out"} | {"seed"}
        recipe["run"] = {k: v for k, v in recipe["run"].items() if k in shared}
    return {"data": data, "encoder": shape}, recipe


def other_set(config: CkptConfig) -> str:
    """The name of the data set or folder if it is not that of the run of --ckpt, else ""."""
    data, of_run = config.data, config.weights.config.get("data", {})
    if data.dataset != of_run.get("dataset", datasets.DataConfig.dataset):
        return data.dataset
    root = Path(data.data_root).resolve()
    same = data.dataset != "folder" or root == Path(of_run["data_root"]).resolve()
    return "" if same else root.name


def folder_beside(config: CkptConfig, *names: str) -> str:
    """The default run folder of an evaluation, in that of --ckpt.

    Its name has `names`, the checkpoint if --ckpt names one, the data set if that of --ckpt is
    another one, and labels, fold and images where they are not the defaults.
    """
    data, parts, path = config.data, list(names), Path(config.ckpt)
    if path.parent.name == "checkpoints":
        parts.append(path.stem)
    if other := other_set(config):
        parts.append(other)
    if data.labels:
        parts.append(f"labels{data.labels}-draw{data.draw}")
    if data.fold >= 0:
        parts.append(f"fold{data.fold}")
    if data.evaluate_on == "validation":
        parts.append("validation")
    return str(config.weights.folder / "-".join(parts))
