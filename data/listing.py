"""The image files of a folder, by split and class."""

import hashlib
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from core.errors import UserError, printable

SPLITS = ("train", "test", "val", "unlabelled", "unlabeled")
FORMAT = 3  # version of the packs; a new number repacks all folders
# Folders that operating systems, network storage and archivers make, in lower case.
SYSTEM = "__macosx @eadir @recycle #recycle #snapshot ~snapshot $recycle.bin lost+found".split()


@dataclass
class Listing:
    """The image files of a data set, relative to its root.

    files     split -> class -> files; classes are sorted, images without one are in ""
    ignored   how many other files have each ending, as text
    state     digest of the names, sizes and times of all images
    """

    files: dict[str, dict[str, list[str]]]
    ignored: str
    state: str


def list_images(root: Path) -> Listing:
    """The images below `root` by split and class; UserError if there are none to train on."""
    if not root.is_dir():
        raise UserError(f"--data-root {root}: no such folder; name the one that holds your images")
    for name in sorted(os.listdir(root)):
        if name != name.lower() in SPLITS and (root / name).is_dir():
            raise UserError(f"--data-root {root}: rename {name} to {name.lower()}")
    labelled = os.path.lexists(root / "train")
    for test in ("test", "val"):
        if not labelled and (root / test).is_dir():
            text = f"{test}/ without train/; add train/, or rename {test}/"
            raise UserError(f"--data-root {root}: {text}")
    # val/ as in ImageNet's layout, where test/ may hold images of unknown class
    test = "test" if _has_folders(root / "test") or not _has_folders(root / "val") else "val"
    files, ignored, digest = {}, Counter(), hashlib.sha256(str(FORMAT).encode())
    for path in _walk(root):
        split, name = _place(path, labelled, test)
        status = os.stat(f"{root}/{path}")
        if not stat.S_ISREG(status.st_mode):
            continue  # reading a pipe, socket or device might never end
        if split and _is_image(path):
            files.setdefault(split, {}).setdefault(name, []).append(path)
            # two swapped files or links can have equal sizes and modification times
            facts = path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
            digest.update(repr(facts).encode())
        else:
            ending = _ending(path) or "without an ending"
            ignored[f"{ending} outside a class" if _is_image(path) else ending] += 1
    others = ", ".join(f"{n} {printable(kind)}" for kind, n in ignored.most_common(3)) or "nothing"
    if not files or (labelled and "train" not in files):
        text = f"no images (ignored: {others}); expected train/CLASS/*, or images without train/"
        raise UserError(f"--data-root {root}: {text}")
    if labelled:
        _sort_classes(root, files, test)
    return Listing(files, others, digest.hexdigest()[:32])


def _has_folders(path: Path) -> bool:
    return any(child.is_dir() and _is_visible(child.name) for child in path.glob("*"))


def image_files(root: Path) -> list[str]:
    """The image files below `root`, relative to it, sorted."""
    paths = [path for path in _walk(root) if _is_image(path)]
    # no pipes, sockets and devices; a link that leads nowhere is an error when it is opened
    return [path for path in paths if os.path.isfile(root / path) or not (root / path).exists()]


def _walk(root: Path) -> list[str]:
    """All files below `root`, relative to it, sorted; links to folders are followed.

    Hidden files and those in SYSTEM are left out.  OSError if a folder can't be read, UserError if
    links lead to one folder twice.
    """

    def fail(error: OSError) -> None:
        raise error

    files, seen = [], {}
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            both = printable(f"{folder} and {seen[real]}")
            raise UserError(f"{both} are one folder, by a link; remove one")
        seen[real] = folder
        folders[:] = [name for name in folders if _is_visible(name)]
        where = Path(folder).relative_to(root).as_posix()
        names = [name for name in names if _is_visible(name)]
        files += names if where == "." else [f"{where}/{name}" for name in names]
    return sorted(files)


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in SYSTEM


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_image(path: str) -> bool:
    """Whether Pillow reads files of this ending."""
    return Image.registered_extensions().get(_ending(path)) in Image.OPEN


def _place(path: str, labelled: bool, test: str) -> tuple[str, str]:
    """Split and class of a file; ("", "") if it is in none.

    test   the folder of test images: test or val
    """
    split, *rest = path.split("/")
    if not labelled or split in ("unlabelled", "unlabeled"):
        return "unlabelled", ""
    if split in ("train", test) and len(rest) > 1:
        return "train" if split == "train" else "test", rest[0]
    return "", ""


def _sort_classes(root: Path, files: dict[str, dict[str, list[str]]], test: str) -> None:
    """Sort the classes by name, and give the test split all classes of train/.

    test   the folder of test images: test or val
    UserError for a class folder without images, and for a class of that folder alone.
    """
    folders = {"train": "train", "test": test}
    for split in folders.keys() & files.keys():
        for folder in sorted((root / folders[split]).iterdir()):
            if folder.is_dir() and _is_visible(folder.name) and folder.name not in files[split]:
                name = printable(str(folder))
                raise UserError(f"{name}: no images in it that Pillow reads; add some or remove it")
    train, test_files = files["train"], files.get("test", {})
    for unknown in test_files.keys() - train.keys():
        name = printable(f"{root}/{test}/{unknown}")
        raise UserError(f"{name}: train/ has no images of that class; rename or add it")
    files["train"] = {name: train[name] for name in sorted(train)}
    if test_files:
        files["test"] = {name: test_files.get(name, []) for name in sorted(train)}
