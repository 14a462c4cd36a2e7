"""Checkpoints: the full training state, written so that a crash at any moment loses nothing.

Each is `step-N.pt`, N the number of steps done, with its SHA-256 beside it.  It is written to a
temporary name, flushed to the disk, renamed, and read back before an older one goes.
"""

import hashlib
import io
import json
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from core.errors import RunError, UserError
from core.files import write_atomically
from core.options import differences

SCHEMA = 1


def save_file(path: Path, state: dict, checksum: bool = False) -> str:
    """Serialise `state` to `path`, whole or not at all; returns its SHA-256.

    The checksum's file goes first: a kill in between leaves no checkpoint that can't be verified.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    digest = hashlib.sha256(data).hexdigest()
    if checksum:
        write_atomically(path.with_suffix(".sha256"), f"{digest}  {path.name}\n".encode())
    write_atomically(path, data)
    return digest


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


class Checkpoints:
    """The folder `checkpoints/` of a run.

    keep     how many of the newest stay
    every    steps between saves; 0 for the last step only
    """

    def __init__(self, folder: Path, every: int, keep: int = 2) -> None:
        self.folder, self.every, self.keep = folder, every, keep

    def due(self, step) -> bool:
        """Whether the cadence, or the run's end, asks for one after this step."""
        return step.last or (self.every > 0 and (step.index + 1) % self.every == 0)

    def save(self, steps_done: int, state: dict) -> Path:
        """Write one checkpoint, verify it, then remove all but the newest `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{steps_done:08d}.pt"
        save_file(path, state | {"schema": SCHEMA, "step": steps_done}, checksum=True)
        if reason := rejected(path):
            raise RunError(f"{path}: written, but {reason}; is the disk failing?")
        for old in self.list()[: -self.keep]:
            old.unlink()
            old.with_suffix(".sha256").unlink(missing_ok=True)
        return path

    def list(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def set_aside(self, after: int) -> None:
        """Rename those of later steps: damaged, or of a past that this run does not go on from."""
        for path in [p for p in self.list() if p.stem > f"step-{after:08d}"]:
            path.rename(path.with_name(f"aside-{path.name}"))

    def newest_valid(self) -> dict | None:
        """The newest checkpoint that is whole; None where there was never one.

        Each one passed over is named with the reason; UserError where all are bad.
        """
        found = self.list()
        for path in reversed(found):
            reason = rejected(path)
            if not reason:
                return load_file(path, "--resume")
            print(f"warning: {path}: {reason}; trying the one before", file=sys.stderr)
        if found:
            names = ", ".join(p.name for p in found)
            raise UserError(f"--resume: no valid checkpoint in {self.folder} ({names} are damaged)")
        return None


def rejected(path: Path) -> str:
    """Why a checkpoint can't be trusted; empty where its checksum holds."""
    try:
        expected = path.with_suffix(".sha256").read_text(encoding="ascii").split()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return "its .sha256 file is missing or empty"
    try:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return str(error.strerror)
    return "" if actual == expected else "its checksum does not match"


def training_state(method, optimizer, precision) -> dict:
    """All that a run needs to go on as if it had never stopped."""
    return {
        "kind": method.name,
        "model": method.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": precision.state_dict(),
    }


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


def resume_state(checkpoints: Checkpoints, resume: str, config, method, facts: dict) -> dict | None:
    """The checkpoint that --resume names, checked against the settings; None for a fresh start.

    facts   what must be as it was without being a setting: number of images, actual precision
    With --override, state["changed"] lists what differs.
    """
    if not resume:
        return None
    if resume == "auto":
        state = checkpoints.newest_valid()
    else:
        path = Path(resume)
        state = load_file(path, "--resume")
        if reason := rejected(path):
            raise UserError(f"--resume {path}: {reason}")
    if state is None:
        return None
    if not isinstance(state, dict) or state.get("kind") != method.name:
        raise UserError(f"--resume {resume}: not a checkpoint of {method.name}")
    if state["schema"] != SCHEMA:
        raise UserError(
            f"--resume {resume}: its format is {state['schema']}, this code reads {SCHEMA}; "
            "go on with the commit that its config.json names"
        )
    changed = differences(config, state["config"])
    changed += [
        f"{k} {state['facts'][k]} -> {v}" for k, v in facts.items() if state["facts"][k] != v
    ]
    if changed and not config.run.override:
        text = ", ".join(changed)
        raise UserError(f"--resume: these differ from the run's: {text} (--override allows it)")
    return state | {"changed": changed}


def restore(state: dict, method, optimizer, precision) -> int:
    """Load a training state into its parts; returns the number of steps done.

    UserError, and nothing is changed, where the networks are others.  With --override the new
    settings hold, and another optimizer starts without a past.
    """
    check_fits(method.state_dict(), state["model"], "--resume: its network", "these settings")
    method.load_state_dict(state["model"])
    if not any(text.startswith("--optimizer ") for text in state["changed"]):
        past = {"state": state["optimizer"]["state"]}  # the groups' settings are the new ones
        optimizer.load_state_dict(optimizer.state_dict() | past)
    precision.load_state_dict(state["scaler"])
    return state["step"]
