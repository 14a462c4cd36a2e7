"""Files that are written whole or not at all, JSON, and locks between processes."""

import errno
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from filelock import lock_descriptor

from core.errors import RunError, UserError, first_process, warn_once

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, data: bytes) -> None:
    """All of `data` under its name, or nothing: a temporary file, flushed, then renamed.

    RunError with the bytes needed and free where it can't be written; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        text, room = f"{path}: {error.strerror}", ""
        if error.errno in FULL:
            free = shutil.disk_usage(path.parent).free
            text, room = f"{text} ({len(data):,} bytes needed, {free:,} free)", "make room and "
        raise RunError(
            f"{text}; what was saved before is intact: {room}go on with --resume"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, where that is possible.

    Windows opens no folders, and some file systems answer that they can't flush one.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in (errno.EIO, *FULL):  # the disk fails, or is full
            raise


def remove_leftovers(folder: Path) -> None:
    """Temporary files of a killed process."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def new_file(path: str | Path, flag: str = "--out") -> Path:
    """UserError unless a file can be written there without losing one."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{flag} {path}: exists; name another file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: no folder {path.absolute().parent}; make it first")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: its folder can't be written to; choose another")
    return path


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError where there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); is it damaged?") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object; is it damaged?")
    return found


def write_json(path: Path, value) -> None:
    """Indented JSON, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


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
        reason = f"the file system has no locks ({error.strerror})"
        warn_once(f"{reason}: don't start two runs in one folder")
        return file
    except BaseException:
        file.close()
        raise
    file.close()
    return None


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
