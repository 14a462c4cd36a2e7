"""The one network that is meant in a file of another project."""

import re

import torch
from torch import Tensor, nn

from core.errors import UserError
from training.load import misfits

# words in the name of a network that is a moving average of another one
AVERAGES = {"momentum", "target", "teacher", "ema", "k", "key", "swa", "avg", "average",
            "averaged", "polyak", "shadow"}  # fmt: skip
COUNTER = "num_batches_tracked"  # of a batch norm; files that predate it count as 0


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
    return all(
        is_plain(a) and is_plain(b) and torch.equal(a.double(), b.double()) for a, b in pairs
    )


def is_plain(value: Tensor) -> bool:
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
