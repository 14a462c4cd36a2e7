"""Download a data set, whole or not at all, in one of several processes."""

import shutil
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

from core.errors import UserError
from core.files import locked

TIMEOUT = 30  # seconds without a byte


def fetch(
    root: Path, names: list[str], get: Callable[[Path], object], download: bool, by_hand: str
) -> None:
    """Download the files or folders `names` to `root`, unless all of them exist.

    get        called with a folder: downloads `names` to it and checks them
    download   whether the user allows it
    by_hand    what to do instead of downloading, for error messages
    UserError if that fails; nothing is left behind then.
    """
    missing = [name for name in names if not (root / name).exists()]
    if not missing:
        return
    if not download:
        raise UserError(f"--data-root {root}: no {missing[0]} there; add --download, or {by_hand}")
    with locked(root / f".{names[0]}.lock"):
        if all((root / name).exists() for name in names):  # made by another process in the meantime
            return
        partial = root / f".{names[0]}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none and would wait forever
        # torchvision sets no filter: before Python 3.14, an archive could write outside the folder
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
        try:
            get(partial)
            for name in names:
                (partial / name).replace(root / name)
        except Exception as error:  # urllib, torchvision and tarfile raise many kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--download: {reason}; try again, or {by_hand}") from error
        finally:
            socket.setdefaulttimeout(before)
            shutil.rmtree(partial, ignore_errors=True)
