"""Checkpoints: the full training state, safe against a crash at any moment.

Each is a file `step-N.pt`, N the number of steps done, with its SHA-256 in `step-N.sha256`.  It is
written atomically and read back before an older one is removed.
"""

import hashlib
import io
from pathlib import Path

import torch

from core.errors import RunError
from core.files import write_atomically

SCHEMA = 1  # version of the format


def save_file(path: Path, state: dict, checksum: bool = False) -> None:
    """Serialize `state` to `path` atomically; with `checksum`, its SHA-256 to a second file."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    if checksum:  # written first, so that a kill leaves no checkpoint without it
        text = f"{hashlib.sha256(data).hexdigest()}  {path.name}\n"
        write_atomically(path.with_suffix(".sha256"), text.encode())
    write_atomically(path, data)


def rejected(path: Path) -> str:
    """Why a checkpoint is not valid; empty if its checksum matches."""
    try:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        expected = path.with_suffix(".sha256").read_bytes()
    except OSError as error:
        return str(error)
    return "" if expected.startswith(actual.encode()) else "its checksum does not match"


class Checkpoints:
    """The folder `checkpoints/` of a run.

    every   steps between saves; 0: save after the last step only
    keep    number of newest checkpoints to keep
    """

    def __init__(self, folder: Path, every: int, keep: int = 2) -> None:
        self.folder, self.every, self.keep = folder, every, keep

    def due(self, step) -> bool:
        """Whether to save after this step: each `every`-th step, and the last."""
        return step.last or (self.every > 0 and (step.index + 1) % self.every == 0)

    def save(self, steps_done: int, state: dict) -> None:
        """Write one checkpoint, verify it, then remove all but the newest `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{steps_done:08d}.pt"
        save_file(path, state | {"schema": SCHEMA, "step": steps_done}, checksum=True)
        if reason := rejected(path):
            raise RunError(f"{path}: written, but {reason}; is the disk failing?")
        for old in self.list()[: -self.keep]:
            old.unlink()
            old.with_suffix(".sha256").unlink(missing_ok=True)

    def list(self) -> list[Path]:
        """All checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))
