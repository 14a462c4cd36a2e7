"""STL-10 (Coates, Ng, Lee 2011): its official binary files, or smaller ones, memory-mapped."""

import hashlib
import os
import shutil
import tarfile
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from core.errors import UserError
from core.files import locked
from data.datasets import DataConfig, Dataset
from data.images import Images

FOLDER = "stl10_binary"
URL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
MD5 = "91f7769df0f17e558f3565bffb0c7dfb"  # as in torchvision.datasets.STL10
FAILURES = (OSError, EOFError, ValueError, HTTPException, tarfile.TarError, zlib.error)
TIMEOUT = 30  # seconds without a byte
IMAGE = 3 * 96 * 96
SIZES = {"train_X.bin": 5000 * IMAGE, "train_y.bin": 5000, "unlabeled_X.bin": 100_000 * IMAGE,
         "test_X.bin": 8000 * IMAGE, "test_y.bin": 8000}  # fmt: skip
TEXTS = ("fold_indices.txt", "class_names.txt")


def prepare(root: Path, data: DataConfig) -> None:
    """Download, check and unpack the archive where `root`/stl10_binary is missing."""
    folder, manual = root / FOLDER, f"fetch {URL} yourself and run: tar -xzf FILE -C {root}"
    if folder.is_dir():
        return
    if not data.download:
        raise UserError(f"--data-root: no STL-10 at {folder}; add --download (2.5 GB), or {manual}")
    with locked(root / ".stl10.lock"):
        if folder.is_dir():
            return
        partial = root / ".stl10-partial"  # all under one name, so that a killed run's is found
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            _extract(_fetch(partial / "archive"), partial / FOLDER)
            os.rename(partial / FOLDER, folder)
        except FAILURES as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--download: STL-10: {reason}; try again, or {manual}") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _fetch(target: Path) -> Path:
    """Download the archive to `target`; ValueError where it is not the official one."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(URL, timeout=TIMEOUT) as response, open(target, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0) or None
        with tqdm(total=total, unit="B", unit_scale=True, desc="STL-10", disable=None) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    if digest.hexdigest() != MD5:
        raise ValueError(f"the download's md5 is {digest.hexdigest()}, expected {MD5}")
    return target


def _extract(archive: Path, folder: Path) -> None:
    """Write the known members as plain files into `folder`; ValueError for anything suspicious."""
    folder.mkdir()
    with tarfile.open(archive, "r:gz") as tar:
        for member in tqdm(tar, desc="unpacking", unit=" files", disable=None):
            path = PurePosixPath(member.name)
            plain = member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            if path.is_absolute() or ".." in path.parts or not plain:
                raise ValueError(f"the archive's member {member.name!r} is refused")
            if member.isdir() or str(path.parent) != FOLDER or path.name not in (*SIZES, *TEXTS):
                continue
            expected = SIZES.get(path.name, min(member.size, 1 << 20))  # texts: at most 1 MiB
            if member.size != expected:
                raise ValueError(f"{member.name} has {member.size} bytes, expected {expected}")
            with open(folder / path.name, "xb") as file:
                shutil.copyfileobj(tar.extractfile(member), file, 1 << 20)
    missing = [name for name in (*SIZES, *TEXTS) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"the archive lacks {', '.join(missing)}")


def load(root: Path, data: DataConfig) -> Dataset:
    """Map the files; a UserError names the file whose size, labels or folds are wrong."""
    folder = root / FOLDER
    labels, test_labels = (_labels(folder / f"{split}_y.bin") for split in ("train", "test"))
    train = _images(folder / "train_X.bin", len(labels))
    test = _images(folder / "test_X.bin", len(test_labels))
    unlabelled = folder / "unlabeled_X.bin"
    official = 100_000 if len(labels) == 5000 else None
    unlabelled = _images(unlabelled, official) if unlabelled.exists() else None
    names = _read(folder / "class_names.txt").decode(errors="replace").split()
    if len(names) != 10:
        raise _wrong(folder / "class_names.txt", f"{len(names)} names, expected 10")
    folds = _folds(folder / "fold_indices.txt", len(labels))
    return Dataset(train, labels, unlabelled, test, test_labels, names, folds)


def _images(path: Path, count: int | None) -> Images:
    """`count` images, or as many as there are; in the file each is (3, W, H), column-major."""
    size = path.stat().st_size if path.is_file() else 0
    if size != count * IMAGE if count else not size or size % IMAGE:
        expected = f"{count * IMAGE} ({count} images)" if count else f"a multiple of {IMAGE}"
        raise _wrong(path, f"{size} bytes, expected {expected}")
    return Images([np.memmap(path, np.uint8, "r", shape=(size // IMAGE, 3, 96, 96))], True)


def _labels(path: Path) -> np.ndarray:
    """0-based labels."""
    labels = np.frombuffer(_read(path), np.uint8)
    wrong = np.flatnonzero((labels < 1) | (labels > 10))
    if not len(labels) or len(wrong):
        what = f"label {labels[wrong[0]]} at byte {wrong[0]}" if len(labels) else "0 bytes"
        raise _wrong(path, f"{what}, expected labels 1 to 10")
    return labels.astype(np.int64) - 1


def _folds(path: Path, count: int) -> list[np.ndarray]:
    """Ten index sets below `count`, one a line."""
    try:
        folds = [np.array(line.split(), np.int64) for line in _read(path).strip().splitlines()]
    except (ValueError, OverflowError):
        folds = []
    valid = all(len(np.unique(f)) == len(f) > 0 <= f.min() <= f.max() < count for f in folds)
    if len(folds) != 10 or not valid:
        raise _wrong(path, f"expected ten lines of different indices from 0 to {count - 1}")
    return folds


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _wrong(path, error.strerror) from None


def _wrong(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; unpack STL-10 again, or delete its folder and --download")
