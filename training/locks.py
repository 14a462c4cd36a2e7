"""File locks between processes.  The kernel holds them, so that a killed process holds none."""

import functools
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from filelock import lock_descriptor

from training.config import UserError
from training.distributed import first_process


def open_locked(path: Path, wait: bool = False) -> TextIO | None:
    """The file `path`, made if missing and locked until it is closed; None if another has the lock.

    wait   until the other process gives it back
    Where the file system has no locks, a warning says so and the file is not locked.  What is
    written begins behind the first byte: Windows locks that one, and lets nobody read it.
    """
    file = open(path, "a+", encoding="ascii")
    try:
        if lock_descriptor(file.fileno(), blocking=wait):
            return file
    except OSError as error:  # ENOSYS, ENOLCK, EOPNOTSUPP, ...
        _warn(error.strerror)
        return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None


@functools.cache  # once a process
def _warn(reason: str) -> None:
    """Say that nothing keeps two runs apart."""
    if first_process():
        text = f"warning: the file system has no locks ({reason})"
        print(f"{text}: don't start two runs in one folder", file=sys.stderr)


@contextmanager
def locked(path: Path, flag: str = "--data-root"):
    """Hold the lock on the file `path`, which is made if missing, and stays.

    UserError that names `flag` where the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_locked(path)
        if file is None:
            if first_process():
                print(f"waiting for another process that holds {path}")
            file = open_locked(path, wait=True)
    except OSError as error:
        raise UserError(
            f"{flag}: cannot write {path} ({error.strerror}); choose a folder that is writable"
        ) from None
    with file:
        yield
