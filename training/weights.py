"""Encoder weights in and out: `encoder.pt`, run folders, checkpoints, other people's files."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.checkpoints import check_fits, load_file, save_file
from training.config import UserError, read_config
from training.run_folder import read_json

PREFIXES = ("module.", "_orig_mod.", "method.")
# torchvision's names of the children of an nn.Sequential(*list(resnet.children())[:-1])
SEQUENTIAL = {"0": "conv1", "1": "bn1", **{str(i + 3): f"layer{i}" for i in (1, 2, 3, 4)}}
AVERAGES = {"momentum", "target", "teacher", "ema", "k"}  # in the name of a second network
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass
class Weights:
    """An encoder's state dict (torchvision's names), what it belongs to, and its run's config."""

    state_dict: dict[str, Tensor]
    meta: dict
    config: dict
    folder: Path

    def tables(self) -> tuple[dict, dict]:
        """For an evaluation: the run's data and the encoder's shape; its recipe's tables."""
        draws = ("labels", "draw", "fold", "evaluate_on", "download")
        data = {k: v for k, v in self.config.get("data", {}).items() if k not in draws}
        shape = {k: self.meta[k] for k in ("arch", "stem", "width", "init") if k in self.meta}
        return {"data": data, "encoder": shape}, self.config.get("recipe", {})

    def load_into(self, encoder: nn.Module, config, source: str) -> None:
        """Copy them into an encoder made by `config`; UserError where they belong to another.

        config   EncoderConfig; the stems have equal shapes, so it is compared with `meta`
        """
        for key in ("arch", "stem", "width"):
            made = self.meta.get(key, getattr(config, key))
            if made != getattr(config, key):
                raise UserError(f"{source}: made with --{key} {made}, not {getattr(config, key)}")
        load_weights(encoder, self.state_dict, source)

    def normalisation(self, images) -> tuple[list, list]:
        """Mean and std of the inputs it was trained on; those of `images` where none are known."""
        if "mean" in self.meta:
            return self.meta["mean"], self.meta["std"]
        return images.statistics()

    def beside(self, name: str, data, folds: bool = False, sweep: bool = False) -> str:
        """Default run folder of an evaluation: beside the weights, named after its labels."""
        parts = [name] + ["sweep"] * sweep + ["folds"] * folds
        parts += [f"labels{data.labels}-draw{data.draw}"] * bool(data.labels)
        parts += [f"fold{data.fold}"] * (data.fold >= 0)
        parts += ["validation"] * (data.evaluate_on == "validation")
        return str(self.folder / "-".join(parts))


def save_encoder(path: Path, encoder: nn.Module, meta: dict) -> None:
    """Write {"state_dict", "meta"}; the stems have equal shapes, so weights alone don't say."""
    state = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    save_file(path, {"state_dict": state, "meta": meta})


def read_weights(path: str | Path, flag: str = "--ckpt") -> Weights:
    """Weights from a run folder, one of its checkpoints, an encoder.pt or a bare state dict.

    `meta` is empty for a bare state dict.  Raises UserError where nothing fits.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "encoder.pt").exists():
            raise UserError(f"{flag} {path}: no encoder.pt in it; is the run finished?")
        path = path / "encoder.pt"
    try:
        state, meta, training = _encoder_of(load_file(path, flag))
        folder = path.parent.parent if training else path.parent
        config = folder / "config.json"
        saved = read_json(config).get("config", {}) if config.exists() else {}
        state = strip(state) if meta else find_resnet(strip(state), f"{flag} {path}")
        weights = Weights(state, dict(meta), dict(saved), folder)
        weights.tables()
        fits = all(isinstance(v, Tensor) for v in weights.state_dict.values())
        shapes = [torch.tensor(meta[k]).shape for k in ("mean", "std") if k in meta]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        fits = False
    if not fits or not state or any(shape != (3,) for shape in shapes):
        raise UserError(f"{flag} {path}: holds no weights of an encoder")
    return weights


def _encoder_of(loaded: dict) -> tuple[dict, dict, bool]:
    """(state dict, meta, whether it is a training checkpoint) of what was in a file."""
    meta = loaded.get("meta", {})
    if "model" in loaded:
        model, prefix = strip(loaded["model"]), "encoder."
        state = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
        return (state, meta, True) if state else (model, meta, False)
    if isinstance(loaded.get("encoder"), dict):  # a classifier.pt
        return loaded["encoder"], meta, False
    return loaded.get("state_dict", loaded), meta, False


def read_ckpt_config(argv: list[str], sections: dict[str, type], *, extra=(), **keywords):
    """`read_config` with a flag --ckpt, whose run gives the defaults; `.weights` holds it."""
    found = []

    def inherit(given) -> tuple[dict, dict]:
        found.append(read_weights(given.ckpt))
        return found[0].tables()

    text = "run folder, checkpoint or encoder.pt; bare weights need --arch, --stem, --width"
    ckpt = (("--ckpt",), dict(required=True, metavar="RUN", help=text))
    config = read_config(argv, sections, inherit=inherit, extra=(ckpt, *extra), **keywords)
    (config.weights,) = found
    return config


def strip(state: dict) -> dict:
    """Names without the prefixes that DDP, torch.compile and the online probe put before them."""

    def bare(name):
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        return name

    return {bare(k): v for k, v in state.items()}


def find_resnet(state: dict, source: str) -> dict:
    """The encoder in a file of another library, by torchvision's names.

    Such files have it below a prefix (`backbone.`, `encoder_q.`, ...), often beside a moving
    average of it and heads, and some number its layers.  UserError where several could be meant.
    """
    if "conv1.weight" in state:
        return state
    found = {}
    for first, block in (("conv1.weight", "layer1.0."), ("0.weight", "4.0.")):
        prefixes = {name.removesuffix(first) for name in state if name.endswith(first)}
        found |= {p: first for p in prefixes if f"{p}{block}conv1.weight" in state}
    trained = [p for p in found if not AVERAGES & set(re.split("[._]", p))] or list(found)
    if len(trained) > 1:
        names = ", ".join(sorted(trained))
        raise UserError(f"{source}: holds several networks ({names}); save the one that is meant")
    if not trained:
        return state
    (prefix,) = trained
    state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if found[prefix] == "conv1.weight":
        return state
    parts = (k.split(".", 1) for k in state)
    return {f"{SEQUENTIAL.get(i, i)}.{rest}": state[f"{i}.{rest}"] for i, rest in parts}


def load_weights(encoder: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` into the encoder; UserError with the first names unless all fit exactly.

    A classifier's last layer (fc.*) is left out: the encoder has none.
    """
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    check_fits(encoder.state_dict(), state, source, "--arch, --stem, --width")
    encoder.load_state_dict(state)


def imagenet_weights(arch: str, stem: str, width: float) -> dict[str, Tensor]:
    """torchvision's ImageNet weights, from its cache or by its own download."""
    from torchvision import models

    if stem != "imagenet" or width != 1:
        raise UserError(f"--init imagenet needs --stem imagenet --width 1, not {stem} and {width}")
    weights = models.get_model_weights(arch)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # urllib and torch.hub raise many kinds
        target = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--init imagenet: could not fetch {weights.url} ({reason}); put that file at {target}"
        ) from None


def initialise(encoder: nn.Module, config, mean: list, std: list) -> tuple[list, list]:
    """Load what --init names into the encoder; returns the mean and std its inputs need.

    config   EncoderConfig; mean and std are those of the data, used where --init names no other
    """
    if config.init == "random":
        return mean, std
    if config.init == "imagenet":
        state = imagenet_weights(config.arch, config.stem, config.width)
        load_weights(encoder, state, "--init imagenet")
        return IMAGENET_MEAN, IMAGENET_STD
    weights = read_weights(config.init, "--init")
    weights.load_into(encoder, config, f"--init {config.init}")
    return weights.meta.get("mean", mean), weights.meta.get("std", std)
