"""Encoder weights in and out: `encoder.pt`, run folders, checkpoints, other people's files."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.checkpoints import check_fits, load_file, misfits, save_file
from training.config import UserError, read_config
from training.locks import locked
from training.run_folder import read_json

# words in the name of a network that is a moving average of another one
AVERAGES = {"momentum", "target", "teacher", "ema", "k", "key", "swa", "avg", "average",
            "averaged", "polyak", "shadow"}  # fmt: skip
COUNTER = "num_batches_tracked"  # of a batch norm; files that predate it count as 0
OURS = {"arch", "stem", "width"}  # in the meta data of every file that this project writes
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


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
        state = self.tensors
        if self.prefix is not None or not self.meta:
            state = find_network(state, encoder.state_dict(), source, self.prefix)
        load_weights(encoder, state, source)

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


def find_network(
    tensors: dict[str, Tensor], own: dict[str, Tensor], source: str, prefix: str | None = None
) -> dict[str, Tensor]:
    """The one network in `tensors` with the names and shapes of the state dict `own`.

    In the files of other projects it lies below some prefix (`backbone.`, `state_dict.encoder_q.`,
    ...), often beside heads and a moving average of it; some number its children.  Where several
    different ones are there, UserError lists them.  Where none is complete: the one with the most
    tensors of `own`, for a message that says what it lacks.
    """
    near = _candidates(tensors, own)
    if prefix is not None:
        name = prefix.strip(".")
        exact = {p: state for p, state in near.items() if p.rstrip(".") == name}
        near = exact or {p: state for p, state in near.items() if f".{name}." in f".{p}"}
        if not near:
            raise UserError(f"{source}: no network of that name and shape in it")
    whole = {p: state for p, state in near.items() if not misfits(own, state)}
    if not whole:
        return max(near.values(), key=lambda state: len(state.keys() & own.keys()), default=tensors)
    trained = [p for p in whole if not AVERAGES & _words(p)] or list(whole)
    first, *others = trained
    if all(_same(whole[first], whole[p], own) for p in others):
        return whole[first]
    names = [p.rstrip(".") or "." for p in trained]
    raise UserError(
        f"{source}: holds several networks of this shape ({', '.join(names)}); name the one that "
        f"is meant behind a colon, as in FILE:{names[-1]}"
    )


def _candidates(tensors: dict, own: dict) -> dict[str, dict[str, Tensor]]:
    """prefix -> state dict of what might be a network like `own`, without heads beside it."""
    candidates, stages = {}, list(dict.fromkeys(name.split(".")[0] for name in own))
    _, dot, rest = next(iter(own)).partition(".")
    for first in (stages[0], "0"):  # nn.Sequential numbers its children
        end = f".{first}{dot}{rest}"
        for prefix in [k.removesuffix(end[1:]) for k in tensors if f".{k}".endswith(end)]:
            below = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            children = list(dict.fromkeys(k.split(".")[0] for k in below))
            numbers = sorted(filter(str.isdecimal, children), key=int)
            names = dict(zip(numbers if first == "0" else stages, stages, strict=False))
            state = {}
            for key, value in below.items():
                child, _, inner = key.partition(".")
                if child in names:
                    name = f"{names[child]}.{inner}" if inner else names[child]
                    # as pytorch-cifar, SupContrast and lightly call it
                    name = name if name in own else name.replace(".shortcut.", ".downsample.")
                    state[name] = value
            candidates.setdefault(prefix, with_counters(state, own))
    return candidates


def _words(prefix: str) -> set[str]:
    """EMAModel.encoder_k. -> ema, model, encoder, k"""
    return {word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", prefix)}


def _same(state: dict, other: dict, names) -> bool:
    """Whether two state dicts hold the same values under `names`."""
    pairs = [(state[k], other[k]) for k in names]
    return all(_plain(a) and _plain(b) and torch.equal(a.double(), b.double()) for a, b in pairs)


def _plain(value: Tensor) -> bool:
    """Whether it holds one number per element: not sparse, quantized, sharded or on "meta"."""
    packed = value.is_quantized or "float4" in str(value.dtype)
    whole = type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu"
    return whole and value.layout == torch.strided and not packed


def with_counters(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the batch norms' counters at 0 where it lacks them, as older files do.

    torchvision's published ImageNet weights are such files; torch loads them in the same way.
    """
    missing = [k for k in own if k.endswith(COUNTER) and k not in state]
    return state | {k: torch.zeros_like(own[k]) for k in missing}


def load_weights(encoder: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy `state` into the encoder; UserError with the first names unless all fit exactly.

    A classifier's last layer (fc.*) is left out: the encoder has none.
    """
    state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    own = encoder.state_dict()
    state = with_counters(state, own)
    for name in (k for k, v in state.items() if not _plain(v)):
        text = "sparse, quantized, sharded or without values; save plain tensors"
        raise UserError(f"{source}: {name} is {text}")
    # what overflows float32 is then found not to be finite
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    check_fits(own, state, source, "--arch, --stem, --width")
    encoder.load_state_dict(state)


def fetch(config) -> None:
    """Have published weights in torch's cache where --init asks for them; one process downloads.

    config   EncoderConfig
    To be called before any process group exists.
    """
    if config.init == "imagenet":
        imagenet_weights(config.arch, config.stem, config.width)


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
