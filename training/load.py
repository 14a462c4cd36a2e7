"""Reading files of tensors, without running pickled code; whether they fit a network."""

import json
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from core.errors import UserError


def load_file(path: Path, flag: str) -> dict:
    """What `save_file` wrote, on the CPU; UserError for anything else.  Never runs pickled code."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about formats of old files
            if file.read(9)[8:] == b"{":  # safetensors: the length of a JSON text, and that text
                return _load_safetensors(path, flag)
            if zipfile.is_zipfile(file):  # torch.load doesn't look at the checksums inside
                with zipfile.ZipFile(file) as archive:
                    if bad := archive.testzip():
                        raise Damaged(f"its part {bad} is damaged")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    except Exception as error:  # torch raises many kinds for bytes that are no checkpoint
        raise UserError(f"{flag} {path}: {_refusal(error)}") from None


def _load_safetensors(path: Path, flag: str) -> dict:
    """The tensors, and the meta data where eval.export wrote them."""
    try:
        from safetensors import safe_open  # an optional extra
    except ImportError:
        text = f"{flag} {path}: needs the package safetensors: pip install -r eval/requirements.txt"
        raise UserError(text) from None
    with safe_open(path, "pt") as file:
        meta = {k: _from_json(v) for k, v in (file.metadata() or {}).items()}
        return {"state_dict": {k: file.get_tensor(k) for k in file.keys()}, "meta": meta}


def _from_json(text: str):
    """The value, or the text itself, as other projects write it."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _refusal(error: Exception) -> str:
    """Why torch.load(weights_only=True) has read nothing, and what to do."""
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)|got <class '([^']+)'|(TorchScript)", text):
        return (
            "refused, since it holds more than tensors and plain values: "
            f"{refused[refused.lastindex]}; if you trust it, "
            "load it with its own code and save the state dict alone: "
            "torch.save(model.state_dict(), 'weights.pth')"
        )
    damage = (
        text if isinstance(error, Damaged) else "torch.save wrote no such file, or it is damaged"
    )
    return f"not a checkpoint or state dict ({damage})"


class Damaged(Exception):
    """A file whose checksum is wrong."""


def misfits(own: dict[str, Tensor], state: dict) -> list[str]:
    """What keeps `state` from having exactly the tensors of `own`, a few words each."""
    problems = [f"{k} is missing" for k in own if k not in state]
    problems += [f"{k} is unknown" for k in state if k not in own]
    for k in [k for k in own if k in state]:
        if not isinstance(state[k], Tensor):
            problems.append(f"{k} is no tensor")
        elif state[k].shape != own[k].shape:
            problems.append(f"{k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)}")
        elif own[k].is_floating_point() and not state[k].is_floating_point():
            problems.append(f"{k} holds {state[k].dtype} values")
    return problems


def check_fits(own: dict[str, Tensor], state: dict, source: str, what: str) -> None:
    """UserError with the first names unless `state` has exactly the tensors of `own`, finite."""
    if problems := misfits(own, state):
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} does not fit {what}: " + "; ".join(problems[:3]) + more)
    for k, v in state.items():
        if not torch.isfinite(v).all():
            raise UserError(f"{source}: {k} is not finite; take an earlier checkpoint")
