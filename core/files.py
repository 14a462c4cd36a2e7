"""Atomic writes, JSON, and locks between processes."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import TextIO

from filelock import lock_descriptor

from core.errors import RunError, UserError, first_process, warn_once


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to a temporary file, flush it to the disk, and rename it to `path`.

    RunError with the bytes needed and free if that fails; an old file at `path` is kept.
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
    with contextlib.suppress(OSError):  # Windows and some file systems can't flush folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename
        finally:
            os.close(folder)


def new_file(path: str | Path, flag: str = "--out") -> Path:
    """`path` as a Path; UserError if it exists or its folder can't be written to."""
    path = Path(path)
    if path.exists():
        raise UserError(f"{flag} {path}: exists; name another file")
    folder = path.absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"{flag} {path}: {folder} is not a writable folder; create it first")
    return path


def read_json(path: Path) -> dict:
    """The object in a JSON file; UserError if it holds none or can't be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); is it damaged?") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object; is it damaged?")
    return value


def read_json_lines(path: Path) -> list[dict]:
    """The objects in a file of JSON lines, without incomplete lines; [] if it does not exist."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def write_json(path: Path, value) -> None:
    """Write indented JSON atomically."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def open_locked(path: Path, wait: bool = False) -> TextIO | None:
    """Open `path`, created if missing, and lock it until it is closed; None if it is locked.

    wait   whether to wait for the lock instead of returning None
    The operating system releases the lock when its holder dies.  On a file system without locks,
    the file is opened unlocked with a warning.  Write from the second byte on: Windows locks the
    first, which other processes then can't read.
    """
    file = open(path, "a+", encoding="ascii")
    try:
        if lock_descriptor(file.fileno(), blocking=wait):
            return file
    except OSError as error:  # ENOSYS, ENOLCK, EOPNOTSUPP, ...
        warn_once(f"the file system has no locks ({error.strerror}): start only one run per folder")
        return file
    file.close()
    return None


def lock_folder(folder: Path) -> TextIO:
    """The locked file `folder`/.lock, with this process's id; UserError if another one has it."""
    file = open_locked(folder / ".lock")
    if file is None:
        with open(folder / ".lock", encoding="ascii") as held:
            held.seek(1)
            raise UserError(f"--out {folder}: in use by process {held.read()}")
    file.truncate(0)
    file.write(f" {os.getpid()}")
    file.flush()
    return file


@contextlib.contextmanager
def locked(path: Path, flag: str = "--data-root"):
    """Context that holds the lock on the file `path`, created if missing and never removed.

    UserError that names `flag` if the folder can't be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open_locked(path)
        if file is None:
            if first_process():
                print(f"waiting for another process that has locked {path}")
            file = open_locked(path, wait=True)
    except OSError as error:
        raise UserError(
            f"{flag}: cannot write {path} ({error.strerror}); choose a writable folder"
        ) from None
    with file:
        yield
