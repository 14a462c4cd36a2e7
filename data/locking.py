"""A lock between processes that would otherwise download or pack the same data at once."""

import fcntl
from contextlib import contextmanager
from pathlib import Path

from training.config import UserError


@contextmanager
def locked(path: Path):
    """Hold an exclusive lock on the file `path`, which is made if missing, and stays.

    A killed process holds none.  UserError where the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise UserError(
            f"--data-root: cannot write {path} ({error.strerror}); choose a folder that is writable"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that holds {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
