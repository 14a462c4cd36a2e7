"""Where packs may lie: images that were decoded once, as arrays that can be memory-mapped."""

import hashlib
import os
from pathlib import Path


def pack_folders(root: Path, name: str) -> tuple[Path, Path]:
    """Where packs may lie: in `root`, or where that can't be written to, in a folder of ours."""
    real = os.path.realpath(root)
    digest = hashlib.sha256(os.fsencode(real)).hexdigest()[:12]
    ours = f"{os.path.basename(real)[:40]}-{digest}"  # a name has 255 bytes at most
    return root / name, Path("datasets", "packs", ours)


def writable(lock: Path) -> bool:
    """Whether the file can be locked and others be made beside it.

    Not on a read-only disk, in somebody else's folder, or where something else has the name.
    """
    folder = next(p for p in lock.absolute().parents if os.path.lexists(p))
    free = os.path.isfile(lock) and os.access(lock, os.W_OK) or not os.path.lexists(lock)
    return free and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
