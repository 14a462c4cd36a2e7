"""The image files of a folder, by split and class."""

import contextlib
import errno
import hashlib
import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from core.errors import UserError, printable

FORMAT = 2  # of the packs that are made of a listing
# TensorBoard's folders of pictures, result tables and Python's environments have these files.  What
# else is never data begins with a dot or is the work of an operating system, a NAS or an archiver.
OUTPUT = ({"sprite.png", "tensors.tsv"}, {"settings.json", "cells.jsonl"}, {"pyvenv.cfg"})
SYSTEM = {"@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot",
          "$recycle.bin", "system volume information", "lost.dir", "lost+found",
          "__macosx"}  # in small letters  # fmt: skip


@contextlib.contextmanager
def _one_line():
    """UserError for what can't be read."""
    try:
        yield
    except OSError as error:
        text = printable(f"{error.filename}: {error.strerror}")
        raise UserError(f"{text}; make it readable or move it away") from None


@dataclass
class Listing:
    """The image files of a data set, relative to its root.

    files     split -> class -> files; classes are in order, images without one are in ""
    ignored   kind of file -> how many there are
    notes     warnings for the user
    state     digest of the names, sizes and times of all images
    """

    files: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    ignored: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    state: str = ""

    def __str__(self) -> str:
        """The files that are ignored, in words."""
        kinds = ", ".join(f"{n} {printable(kind)}" for kind, n in self.ignored.most_common(3))
        more = ", ..." if len(self.ignored) > 3 else ""
        return f"{self.ignored.total()} other files" + (f" ({kinds}{more})" if kinds else "")


@_one_line()
def list_images(root: Path) -> Listing:
    """The images below `root` by split and class; UserError where nothing can be trained on."""
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; name the one that holds your images")
    found, folders = walk(root)
    # a link may lead to a disk that is not there now
    labelled = (root / "train").is_dir() or (root / "train").is_symlink()
    listing, known = Listing(), set(_images(found))
    for path in found:
        split, name = _place(path, labelled)
        if path in known and split:
            listing.files.setdefault(split, {}).setdefault(name, []).append(path)
        else:
            kind = os.path.splitext(path)[1].lower()[:20] or "without an ending"
            kind = kind if found[path] else "dead links"
            listing.ignored[kind + (" outside a class" if path in known else "")] += 1
    files = listing.files
    if not files or labelled and "train" not in files:
        raise UserError(f"--data-root {root}: no images, but {listing}; expected train/CLASS/*, "
                        "or images and no folder train/")  # fmt: skip
    train, test = files.get("train", {}), files.get("test", {})
    for unknown in test.keys() - train.keys():
        name = printable(f"{root}/test/{unknown}")
        raise UserError(f"{name}: train/ has no images of that class; rename or add it")
    if train:
        files["train"] = {name: train[name] for name in sorted(train)}
    if test:
        files["test"] = {name: test.get(name, []) for name in sorted(train)}
    places = {f: _place(f + "/x", labelled) for f in folders if f.count("/") == 1}
    if empty := [f for f, (split, c) in places.items() if c and not files.get(split, {}).get(c)]:
        listing.notes.append(f"no images in {some(empty)}")
    if dead := [path for path, real in found.items() if not real and path not in known]:
        listing.notes.append(f"links that lead nowhere: {some(dead)}")
    _inspect(root, listing, found)
    return listing


def _inspect(root: Path, listing: Listing, real: dict[str, str]) -> None:
    """Fill in the listing's state, and warn of images that links show twice.

    real   of each file its real path
    """
    digest, first, twice = hashlib.sha256(str(FORMAT).encode()), {}, []
    here = os.path.join(os.path.realpath(root), "")
    for path in (f for by_class in listing.files.values() for fs in by_class.values() for f in fs):
        status = os.stat(root / path, follow_symlinks=bool(real[path]))
        # files that were swapped may have equal times of their last change
        times = f"{status.st_mtime_ns}\0{status.st_ctime_ns}"
        target = real[path].removeprefix(here)  # a link may be replaced by another
        digest.update(os.fsencode(f"{path}\0{target}\0{status.st_size}\0{times}\0"))
        hard_link = status.st_nlink > 1 and (status.st_dev, status.st_ino)
        key = hard_link or real[path] or path
        if first.setdefault(key, path) != path:
            twice.append(f"{first[key]} = {path}")
    listing.state = digest.hexdigest()
    if twice:
        listing.notes.append(f"{len(twice)} images are there twice, by links: {some(twice)}")


def some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:3])) + (", ..." if len(names) > 3 else "")


def _place(path: str, labelled: bool) -> tuple[str, str]:
    """Split and class that a file belongs to; no split where it is in none."""
    split, *rest = path.split("/")
    if split == "unlabeled" or not labelled:
        split = "unlabelled"
    if split in ("train", "test") and len(rest) > 1:  # macOS and Linux compose letters differently
        return split, unicodedata.normalize("NFC", rest[0])
    return (split, "") if split == "unlabelled" else ("", "")


def image_files(root: Path) -> list[str]:
    """The image files below `root`, relative to it, sorted."""
    return _images(walk(root)[0])


def _images(files) -> list[str]:
    """Those whose ending is that of a format which Pillow reads."""
    known = {e for e, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [path for path in files if os.path.splitext(path)[1].lower() in known]


@_one_line()
def walk(root: Path) -> tuple[dict[str, str], list[str]]:
    """(files, folders) below `root`, sorted, relative to it; each file with its real path.

    What is hidden, an operating system's or our own output is left out, and so are pipes and
    sockets.  Links are followed, but not to a folder that they are in; one that leads nowhere is a
    file whose real path is "".  UserError where two ways lead to one folder, or one can't be read.
    """
    files, folders, seen = {}, [], {}
    waiting = [("", os.path.realpath(root), [])]
    while waiting:
        where, real, above = waiting.pop()
        if real in above:
            continue  # its images are there already
        folder = os.path.join(root, where)
        if real in seen:
            names = printable(f"{folder} and {seen[real]}")
            raise UserError(f"{names} are one folder, by a link; remove one")
        seen[real] = folder
        folders.append(where)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
        if where and any(marks <= {entry.name for entry in entries} for marks in OUTPUT):
            continue
        for entry in entries:
            if entry.name[0] == "." or entry.name.lower() in SYSTEM:
                continue
            path = f"{where}/{entry.name}" if where else entry.name
            if _is_folder(entry):
                waiting.append((path, os.path.realpath(entry), [*above, real]))
            elif entry.is_symlink():
                files[path] = os.path.realpath(entry) if os.path.exists(entry) else ""
            elif entry.is_file():
                files[path] = os.path.join(real, entry.name)
    return dict(sorted(files.items())), sorted(folders)


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether it is a folder, or a link to one; a link that leads nowhere is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return False
        raise
