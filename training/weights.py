"""Reading encoder weights: `encoder.pt`, run folders, checkpoints, other people's files."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from core.errors import UserError
from core.files import locked, read_json
from training.encoder import EncoderConfig, build_encoder
from training.foreign import find_network, is_plain, with_counters
from training.load import check_fits, load_file

OURS = {"arch", "stem", "width"}  # in the meta data of every file that this project writes
# how the inputs of torchvision's ImageNet weights are made, as an encoder.pt would say it
TORCHVISION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
               "frame": [256, 224], "stored": 256}  # fmt: skip


@dataclass
class Weights:
    """What a file of weights holds.

    tensors   an encoder's state dict with torchvision's names; in the file of another project,
              where `meta` is empty, all tensors by the names that lead to them
    config    of the run that wrote it
    prefix    which network of several is meant: what its names begin with; None: not said
    """

    tensors: dict[str, Tensor]
    meta: dict
    config: dict
    folder: Path
    prefix: str | None = None

    def normalization(self, images) -> tuple[list[float], list[float]]:
        """Mean and std of the inputs it was trained on; those of `images` where none are known."""
        if {"mean", "std"} <= self.meta.keys():
            return self.meta["mean"], self.meta["std"]
        return images.statistics()

    def encoder(self, config: EncoderConfig, source: str) -> nn.Module:
        """The encoder that `config` describes, with these weights."""
        encoder = build_encoder(config)
        self.load_into(encoder, config, source)
        return encoder

    def load_into(self, encoder: nn.Module, config, source: str) -> None:
        """Copy them into an encoder made by `config`; UserError where they belong to another.

        config   EncoderConfig; the stems have equal shapes, so it is compared with `meta`
        """
        for key in ("arch", "stem", "width"):
            made = self.meta.get(key, getattr(config, key))
            if made != getattr(config, key):
                raise UserError(f"{source}: made with --{key} {made}, not {getattr(config, key)}")
        state = self.tensors
        if self.prefix is not None or not self.meta:
            state = find_network(state, encoder.state_dict(), source, self.prefix)
        load_weights(encoder, state, source)


def read_weights(path: str | Path, flag: str = "--ckpt") -> Weights:
    """Weights from a run folder, one of its checkpoints, an encoder.pt, or anybody's file.

    path   FILE:PREFIX names one network of several in a file
    `meta` is empty for files of other projects.  Raises UserError where there are no weights.
    """
    path, prefix = _split(str(path))
    if path.is_dir():
        if not (path / "encoder.pt").exists():
            raise UserError(f"{flag} {path}: no encoder.pt in it; is the run finished?")
        path = path / "encoder.pt"
    loaded = load_file(path, flag)
    meta = loaded.get("meta") if isinstance(loaded, dict) else None
    if not (isinstance(meta, dict) and meta.keys() >= OURS):
        meta = {}
    tensors = flatten(loaded)
    if meta and prefix is None:
        tensors = _encoder_of(tensors)
    if not tensors or not all(_three_numbers(meta[k]) for k in ("mean", "std") if k in meta):
        raise UserError(f"{flag} {path}: holds no weights of an encoder")
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    config = folder / "config.json"
    saved = read_json(config).get("config") if meta and config.exists() else None
    tables = saved.items() if isinstance(saved, dict) else ()
    config = {k: table for k, table in tables if isinstance(table, dict)}
    return Weights(tensors, meta, config, folder, prefix)


def _three_numbers(value) -> bool:
    return isinstance(value, list) and [isinstance(v, int | float) for v in value] == [True] * 3


def _split(path: str) -> tuple[Path, str | None]:
    """FILE:PREFIX as two; a colon in the name of a file that exists is no separator."""
    file, colon, prefix = path.rpartition(":")
    if colon and not Path(path).exists() and Path(file).is_file():
        return Path(file), prefix
    return Path(path), None


def flatten(value) -> dict[str, Tensor]:
    """All tensors in nested dictionaries and lists: names joined by dots -> tensor."""
    tensors, seen = {}, set()  # a pickle may contain itself

    def walk(value, name: str) -> None:
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                walk(part, f"{name}.{key}" if name else str(key))

    walk(value, "")
    tensors.pop("", None)  # a file that is one tensor
    return tensors


def _encoder_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder in an encoder.pt, a classifier.pt or a training checkpoint of this project."""
    prefixes = ("state_dict.", "encoder.", "model.encoder.", "model.method.encoder.")
    for prefix in prefixes:  # the last: of a run with --online-probe
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if state:
            return state
    return {}


def load_weights(encoder: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` into the encoder; UserError with the first names unless all fit exactly.

    A classifier's last layer (fc.*) is left out: the encoder has none.
    """
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    own = encoder.state_dict()
    state = with_counters(state, own)
    for name in (k for k, v in state.items() if not is_plain(v)):
        text = "sparse, quantized, sharded or without values; save plain tensors"
        raise UserError(f"{source}: {name} is {text}")
    # what overflows float32 is then found not to be finite
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    check_fits(own, state, source, "--arch, --stem, --width")
    encoder.load_state_dict(state)


def imagenet_weights(arch: str, stem: str, width: float) -> dict[str, Tensor]:
    """torchvision's ImageNet weights, from its cache or by its own download."""
    from torchvision import models

    if stem != "imagenet" or width != 1:
        raise UserError(f"--init imagenet needs --stem imagenet --width 1, not {stem} and {width}")
    weights = models.get_model_weights(arch)["IMAGENET1K_V1"]
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not target.exists():
        with locked(target.with_suffix(".lock"), "--init imagenet"):
            _download(weights.url, target)
    return flatten(load_file(target, "--init imagenet:"))


def _download(url: str, target: Path) -> None:
    """Fetch a published file, unless another process just has."""
    if target.exists():
        return
    try:
        torch.hub.download_url_to_file(url, str(target), target.stem.rpartition("-")[2])
    except Exception as error:  # urllib and torch.hub raise many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--init imagenet: could not fetch {url} ({reason}); put that file at {target}"
        ) from None


def start_from(config: EncoderConfig, images) -> tuple[nn.Module, list[float], list[float]]:
    """The encoder with what --init names, and the mean and std that its inputs need."""
    if config.init == "imagenet":
        encoder = build_encoder(config)
        state = imagenet_weights(config.arch, config.stem, config.width)
        load_weights(encoder, state, "--init imagenet")
        return encoder, TORCHVISION["mean"], TORCHVISION["std"]
    weights = read_weights(config.init, "--init")
    encoder = weights.encoder(config, f"--init {config.init}")
    return encoder, *weights.normalization(images)
