"""Published data sets that torchvision downloads and reads.

Images that torchvision holds as arrays are used at their size; image files are packed as those of
a folder are.
"""

import hashlib
import importlib.util
import os
from errno import ENOENT
from functools import partial
from pathlib import Path

import numpy as np
import torchvision.datasets as tv

from core.errors import UserError
from data import folder
from data.datasets import DataConfig, Dataset
from data.download import fetch
from data.images import Images
from data.listing import FORMAT, Listing

# arguments of torchvision's classes: a dict for each part of train, a dict for test
FLAG = [{"train": True}], [{"train": False}]
SPLIT = [{"split": "train"}], [{"split": "test"}]
TRAINVAL = [{"split": "trainval"}], [{"split": "test"}]
TRAIN_AND_VAL = [{"split": "train"}, {"split": "val"}], [{"split": "test"}]
# name -> torchvision's class, files or folders that it makes in --data-root, arguments
ARRAYS = {
    "cifar10": (tv.CIFAR10, ["cifar-10-batches-py"], *FLAG),
    "cifar100": (tv.CIFAR100, ["cifar-100-python"], *FLAG),
    "mnist": (tv.MNIST, ["MNIST"], *FLAG),
    "fashion_mnist": (tv.FashionMNIST, ["FashionMNIST"], *FLAG),
    "kmnist": (tv.KMNIST, ["KMNIST"], *FLAG),
    "svhn": (tv.SVHN, ["train_32x32.mat", "test_32x32.mat"], *SPLIT),
}
FILES = {
    "imagenette": (tv.Imagenette, ["imagenette2"], [{"split": "train"}], [{"split": "val"}]),
    "flowers102": (tv.Flowers102, ["flowers-102"], *TRAIN_AND_VAL),
    "oxford_iiit_pet": (tv.OxfordIIITPet, ["oxford-iiit-pet"], *TRAINVAL),
    "food101": (tv.Food101, ["food-101"], *SPLIT),
    "dtd": (tv.DTD, ["dtd"], *TRAIN_AND_VAL),
    "fgvc_aircraft": (tv.FGVCAircraft, ["fgvc-aircraft-2013b"], *TRAINVAL),
}


def prepare(root: Path, data: DataConfig) -> None:
    """Download the set if it is missing in `root`; pack image files that are not packed yet."""
    name = data.dataset
    if name in ("flowers102", "svhn") and importlib.util.find_spec("scipy") is None:
        raise UserError(f"--dataset {name} needs scipy: pip install scipy")
    kind, places, *_ = (ARRAYS | FILES)[name]
    python = f"torchvision.datasets.{kind.__name__}(DIR, download=True)"
    python += ", also with split='test'," if name == "svhn" else ""
    by_hand = f"run {python} on another machine and copy it from DIR"
    fetch(root, places, partial(_parts, name=name, download=True), data.download, by_hand)
    if name in FILES:
        folder.prepare(root / places[0], data, partial(_list_files, name=name))


def load(root: Path, data: DataConfig) -> Dataset:
    """The data set: arrays in memory, or the images that `prepare` has packed, memory-mapped."""
    name = data.dataset
    if name in FILES:
        place = root / FILES[name][1][0]
        return folder.load(place, data, partial(_list_files, name=name))
    names, (train,), (test,) = _read(root, name)
    return Dataset(*_arrays(train), None, *_arrays(test), names)


def _parts(root: Path, name: str, download: bool = False) -> list[list]:
    """torchvision's objects: a list for the parts of train, a list with that for test."""
    kind, _, *splits = (ARRAYS | FILES)[name]
    return [[kind(root, download=download, **part) for part in parts] for parts in splits]


def _read(root: Path, name: str) -> tuple[list[str], list, list]:
    """Class names, and what `_parts` returns; UserError if a file is missing or damaged."""
    try:
        train, test = _parts(root, name)
    except ImportError as error:
        raise UserError(f"--dataset {name}: {error}; install that package again") from error
    except Exception as error:  # torchvision, pickle and scipy raise many kinds
        if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, ENOENT):
            raise  # of the machine, not of the data
        raise _damaged(root, name, error) from error
    # SVHN has no names for its digits; Imagenette has several for each class
    names, *others = [list(getattr(part, "classes", "0123456789")) for part in train + test]
    if any(other != names for other in others) or not all(map(len, train + test)):
        raise _damaged(root, name, "some images or classes are missing")
    return [n if isinstance(n, str) else n[0] for n in names], train, test


def _damaged(root: Path, name: str, error: Exception | str) -> UserError:
    where = ", ".join(str(root / place) for place in (ARRAYS | FILES)[name][1])
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{where}: {reason}; delete it and start with --download")


def _arrays(part) -> tuple[Images, np.ndarray]:
    """Images and labels of an object of torchvision that holds them in memory."""
    pixels = np.asarray(part.data)
    if pixels.ndim == 3:  # gray
        pixels = pixels[:, None]
    elif pixels.shape[3] == 3:  # CIFAR's channels are last
        pixels = pixels.transpose(0, 3, 1, 2)
    labels = part.labels if hasattr(part, "labels") else part.targets
    return Images([np.ascontiguousarray(pixels)]), np.asarray(labels, np.int64)


def _samples(part):
    """(file, label) of each image, from the private attributes where torchvision keeps them."""
    if hasattr(part, "_samples"):
        return part._samples
    files = part._images if hasattr(part, "_images") else part._image_files
    return zip(files, part._labels, strict=True)


def _list_files(place: Path, name: str) -> Listing:
    """The set's image files by split and class, in torchvision's order; `place` is its folder."""
    names, *splits = _read(place.parent, name)
    files, digest = {}, hashlib.sha256(str(FORMAT).encode())
    for split, parts in zip(("train", "test"), splits, strict=True):
        files[split] = {class_name: [] for class_name in names}
        for path, label in (sample for part in parts for sample in _samples(part)):
            file = Path(path).relative_to(place).as_posix()
            files[split][names[label]].append(file)
            try:
                status = os.stat(path)
            except OSError as error:
                raise _damaged(place.parent, name, error) from error
            digest.update(repr((split, label, file, status.st_size, status.st_mtime_ns)).encode())
    return Listing(files, "nothing", digest.hexdigest()[:32])
