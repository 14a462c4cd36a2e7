"""Encoders from files: encoder.pt, run folders, checkpoints, other projects' files."""

import json
import re
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision import models

from core.errors import UserError
from core.files import locked, read_json
from core.options import flag_of
from training.encoder import AUXILIARY, IMAGE_SIZE, EncoderConfig, build_encoder

SHAPE = ("arch", "stem", "width")  # in the metadata of every file that this project writes
# words in the names of networks that are moving averages of another
AVERAGES = set("momentum target teacher ema k key swa avg average averaged polyak shadow".split())


@dataclass
class Weights:
    """The content of a file of weights.

    tensors   all in the file: {".state_dict.conv1.weight": tensor, ...}
    meta      metadata of an encoder.pt; empty for files of other projects
    config    settings of the run that wrote the file
    prefix    PREFIX of FILE:PREFIX, the name of a network in the file
    """

    tensors: dict[str, Tensor]
    meta: dict
    config: dict
    folder: Path
    prefix: str | None

    def normalization(self, images) -> tuple[list[float], list[float]]:
        """Mean and std that the inputs were normalized with; those of `images` if unknown."""
        if {"mean", "std"} <= self.meta.keys():
            return self.meta["mean"], self.meta["std"]
        return images.statistics()

    def encoder(self, config: EncoderConfig, source: str) -> nn.Module:
        """The encoder that `config` describes, with these weights; UserError if they don't fit.

        source   names the file in errors
        """
        for key, expected in config.shape.items():  # different stems may have equal tensor shapes
            made = self.meta.get(key, expected)
            if made != expected:
                raise UserError(f"{source}: made with {flag_of(key)} {made}, not {expected}")
        encoder = build_encoder(config)
        state = find_network(self.tensors, encoder, source, self.prefix)
        load_state(encoder, state, source, ", ".join(map(flag_of, config.shape)))
        return encoder


def read_weights(path: str | Path, flag: str = "--ckpt") -> Weights:
    """Weights from a run folder, one of its checkpoints, an encoder.pt, or any file of tensors.

    path   FILE, or FILE:PREFIX for one of several networks in a file
    UserError if there are no weights.
    """
    file, _, prefix = str(path).rpartition(":")
    if Path(file).is_file() and not Path(path).exists():
        path = Path(file)
    else:
        path, prefix = Path(path), None
    if path.is_dir():
        if not (path / "encoder.pt").exists():
            raise UserError(f"{flag} {path}: no encoder.pt in it; is the run finished?")
        path = path / "encoder.pt"
    content = load_file(path, flag)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    weights = Weights(flatten(content), {}, {}, folder, prefix)
    meta, saved = content.get("meta"), folder / "config.json"
    if isinstance(meta, dict) and meta.keys() >= set(SHAPE):
        weights.meta = meta
        weights.config = read_json(saved).get("config", {}) if saved.exists() else {}
        if folder != path.parent:  # a checkpoint: the network that encoder.pt would have
            weights.prefix = prefix or "encoder"
    return weights


def load_file(path: Path, flag: str) -> dict:
    """The dictionary in a file of torch.save or safetensors, on the CPU; runs no pickled code.

    UserError for any other file; `flag` names it.
    """
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        if zipfile.is_zipfile(path):  # torch.load ignores the checksums in the archive
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        text = "needs the package safetensors: pip install -r eval/requirements.txt"
        raise UserError(f"{flag} {path}: {text}") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    except Exception as error:  # torch raises many types for invalid files
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"holds {code[1]}, which could run code" if code else "no checkpoint, or damaged"
        text = "save tensors alone: torch.save(model.state_dict(), 'weights.pth')"
        raise UserError(f"{flag} {path}: {reason}; {text}") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag} {path}: no checkpoint, but a {type(content).__name__}")
    return content


def _load_safetensors(path: Path) -> dict:
    """The tensors, and the metadata that eval.export writes."""
    from safetensors import safe_open  # an optional extra

    with safe_open(path, "pt") as file:
        meta = file.metadata() or {}
        if meta.keys() >= set(SHAPE):
            meta = {k: json.loads(v) for k, v in meta.items()}
        return {"state_dict": {k: file.get_tensor(k) for k in file.keys()}, "meta": meta}


def flatten(value, name: str = "") -> dict[str, Tensor]:
    """All tensors in nested dictionaries and lists: {".key.key": tensor, ...}."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    tensors = {}
    if isinstance(value, dict):
        for key, part in value.items():
            tensors |= flatten(part, f"{name}.{key}")
    return tensors


def find_network(
    tensors: dict[str, Tensor], encoder: nn.Module, source: str, prefix: str | None
) -> dict[str, Tensor]:
    """The state dict among `tensors` that has the names and shapes of the encoder's.

    prefix   the network's name in the file, or a part of it between dots; None: any name
    Moving averages are used only if there is no other network.  If no shapes fit: the network with
    most names in common.  UserError, which names the file by `source`, for none and for several.
    """
    expected = encoder.state_dict()
    networks = _candidates(tensors, expected)
    *_, (last, layer) = encoder.named_modules()
    if isinstance(layer, nn.Identity):  # drop the classifier's last layer, which it replaced
        for name, state in networks.items():
            networks[name] = {k: v for k, v in state.items() if not k.startswith(f"{last}.")}
    if prefix is not None:
        networks = {n: s for n, s in networks.items() if f".{prefix.strip('.')}." in f".{n}."}
    if not networks:
        name = f" named {prefix}" if prefix else ""
        raise UserError(f"{source}: no network{name} with a tensor {next(iter(expected))} in it")
    complete = {n: s for n, s in networks.items() if _shapes(s) == _shapes(expected)}
    if not complete:
        return max(networks.values(), key=lambda state: len(state.keys() & expected.keys()))
    chosen = [name for name in complete if not AVERAGES & _words(name)] or list(complete)
    first, *others = (complete[name] for name in chosen)
    if any(not torch.equal(first[key], other[key]) for other in others for key in _shapes(first)):
        raise UserError(
            f"{source}: holds several networks of this shape ({', '.join(chosen)}); choose "
            f"one with a colon, as in FILE:{chosen[-1]}"
        )
    return complete[chosen[0]]


def _words(name: str) -> set[str]:
    """EMAModel.encoder_k -> ema, model, encoder, k"""
    return {word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def _candidates(tensors: dict, expected: dict) -> dict[str, dict[str, Tensor]]:
    """Name -> state dict of all networks whose first tensor is named as in `expected`."""
    networks, first = {}, next(iter(expected))
    for start in (first, f"0.{first.partition('.')[2]}"):  # nn.Sequential numbers its children
        for prefix in [k.removesuffix(start) for k in tensors if k.endswith(f".{start}")]:
            below = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            state = _renamed(below, expected, numbered=start != first)
            networks[prefix.strip(".") or "."] = state
    return networks


def _renamed(state: dict, expected: dict, numbered: bool) -> dict[str, Tensor]:
    """The encoder's part of `state`, with the names of `expected`.

    numbered   the children in `state` are numbers, in the order of those in `expected`
    """
    children = theirs = list(dict.fromkeys(name.split(".")[0] for name in expected))
    if numbered:
        theirs = sorted(filter(str.isdecimal, {name.split(".")[0] for name in state}), key=int)
    names, renamed = dict(zip(theirs, children, strict=False)), {}
    for key, value in state.items():
        child = key.split(".")[0]
        if child in names:
            name = names[child] + key.removeprefix(child)
            if name not in expected:  # the name in pytorch-cifar, SupContrast and lightly
                name = name.replace(".shortcut.", ".downsample.")
                name = re.sub(r"\.(norm|conv)\.([12])\.", r".\1\2.", name)  # old DenseNets
            renamed[name] = value
    return renamed


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes without the batch norms' counters, which older files lack and torch sets to 0."""
    return {k: v.shape for k, v in state.items() if not k.endswith("num_batches_tracked")}


def load_state(module: nn.Module, state: dict, source: str, what: str) -> None:
    """Load `state` into the module; UserError if names or shapes differ or a value is not finite.

    source, what   names of the file and of the settings, for errors
    """
    for name, value in module.state_dict().items():
        dtype = state[name].dtype if name in state else value.dtype
        if value.is_floating_point() and not dtype.is_floating_point:  # torch would convert it
            raise UserError(f"{source}: {name} holds {dtype} values; save it as floating point")
    state = OrderedDict(state)  # MNASNet takes no state dict without a version
    names = [name for name, part in module.named_modules() if isinstance(part, models.MNASNet)]
    state._metadata = {name: {"version": models.MNASNet._version} for name in names}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # lists all names and shapes that differ
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source} does not fit {what}: {reason}") from None
    for name, value in module.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError(f"{source}: {name} is not finite; take an earlier checkpoint")


def initial_weights(config: EncoderConfig) -> Weights:
    """The weights that --init names: torchvision's for ImageNet, or a file."""
    if config.init == "imagenet":
        weights = read_weights(imagenet_file(config), "--init")
        return replace(weights, meta=published_inputs(config.arch))
    return read_weights(config.init, "--init")


def published(arch: str):
    """torchvision's first weights for ImageNet: version IMAGENET1K_V1 where there is one."""
    return next(iter(models.get_model_weights(arch)))


def published_inputs(arch: str) -> dict:
    """Metadata of the published weights: how their inputs are resized, cropped and normalized."""
    inputs = published(arch).transforms()
    (size,), (crop,) = inputs.resize_size, inputs.crop_size
    meta = {"mean": inputs.mean, "std": inputs.std, "frame": [size, crop], "stored": size}
    # torchvision gives these two networks a first step that changes mean and std to 0.5
    return meta | ({"mean": [0.5] * 3, "std": [0.5] * 3} if arch in AUXILIARY else {})


def imagenet_file(config: EncoderConfig) -> Path:
    """Path of torchvision's ImageNet weights in torch's cache; one process downloads them."""
    arch, stem, width = config.arch, config.stem, config.width
    if stem != "imagenet" or width != 1:
        raise UserError(f"--init imagenet needs --stem imagenet --width 1, not {stem} and {width}")
    (side, _), url = published(arch).meta["min_size"], published(arch).url
    if arch.partition("_")[0] in IMAGE_SIZE and side != (config.image_size or 224):
        raise UserError(f"--init imagenet: --arch {arch} needs --image-size {side}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if path.exists():
        return path
    with locked(path.with_suffix(".lock"), "--init imagenet"):
        try:
            if not path.exists():  # another process may have downloaded it meanwhile
                torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2])
        except Exception as error:  # urllib and torch.hub raise many types
            reason = str(error).partition("\n")[0] or type(error).__name__
            text = f"could not fetch {url} ({reason}); put that file at {path}"
            raise UserError(f"--init imagenet: {text}") from None
    return path
