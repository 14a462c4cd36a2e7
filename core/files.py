"""Files that are written whole or not at all, JSON, and locks between processes."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TextIO

from filelock import lock_descriptor

from core.errors import RunError, UserError, first_process, warn_once


def write_atomically(path: Path, data: bytes) -> None:
    """Write all of `data` to `path`, or nothing: a temporary file, flushed, then renamed.

    RunError with the bytes needed and free where it can't be written; the old file stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        raise RunError(
            f"{path}: {error.strerror} ({len(data):,} bytes needed, {free:,} free); what was "
            "written before is intact: make room, then start again (a training: with --resume)"
        ) from error
    with contextlib.suppress(OSError):  # Windows opens no folders, some file systems flush none
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename
        finally:
            os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Temporary files of a killed process."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def new_file(path: str | Path, flag: str = "--out") -> Path:
    """`path`; UserError unless a file can be written there without losing one."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{flag} {path}: exists; name another file")
    folder = path.absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"{flag} {path}: no folder {folder} that can be written to; make it first")
    return path


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); is it damaged?") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; is it damaged?")
    return value


def read_json_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines, if there is one; what a crash cut short is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write_json(path: Path, value) -> None:
    """Indented JSON, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def open_locked(path: Path, wait: bool = False) -> TextIO | None:
    """The file `path`, made if missing and locked until it is closed; None if another has the lock.

    wait   until the other process gives it back
    The operating system releases the lock when its holder dies.  Where the file system has no
    locks, a warning says so and the file is not locked.  What is written begins behind the first
    byte: Windows locks that one, and lets nobody read it.
    """
    file = open(path, "a+", encoding="ascii")
    try:
        if lock_descriptor(file.fileno(), blocking=wait):
            return file
    except OSError as error:  # ENOSYS, ENOLCK, EOPNOTSUPP, ...
        reason = f"the file system has no locks ({error.strerror})"
        warn_once(f"{reason}: don't start two runs in one folder")
        return file
    file.close()
    return None


@contextlib.contextmanager
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
