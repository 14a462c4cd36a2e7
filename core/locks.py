"""A lock that one process holds while others wait."""

from contextlib import contextmanager
from pathlib import Path

from core.errors import UserError, first_process
from core.files import open_locked


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
