"""Label draws, folds and held-out images: what is trained on and what is evaluated on."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from core.errors import UserError
from data.datasets import Dataset, LabelledData
from data.images import Images


@dataclass
class Labelled:
    """Images with their labels.

    index   which of the labelled train images they are; None for test images
    """

    images: Images
    labels: np.ndarray
    index: np.ndarray | None
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: np.ndarray) -> "Labelled":
        """The images and labels in `rows`."""
        images, labels = self.images.subset(rows), self.labels[rows]
        return Labelled(images, labels, self.index[rows], self.class_names)

    def hold_out(self) -> "Split":
        """A stratified fifth of these images as `test`, to choose settings on; `train` is the rest.

        If a class has only one image, that is in `train`; UserError if all have only one.
        """
        if self.index is None:
            raise ValueError("settings are never chosen on test images")
        if np.unique(self.labels, return_counts=True)[1].max() < 2:
            raise UserError("no images to choose settings on: each class has one labelled image")
        held = stratified_folds(self.labels, 5)[0]
        return Split(self.part(np.setdiff1d(np.arange(len(self)), held)), self.part(held))


@dataclass
class Split:
    """Images to train on, and images to evaluate on."""

    train: Labelled
    test: Labelled


def stratified_folds(labels: np.ndarray, count: int, seed: int = 0) -> list[np.ndarray]:
    """The rows held out in each of `count` folds, which have equal shares of every class.

    If a class has only one row, that is never held out.
    """
    rng, fold = np.random.default_rng(seed), np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        fold[rows] = np.arange(len(rows)) % count if len(rows) > 1 else -1
    return [np.flatnonzero(fold == f) for f in range(count)]


def each_fold(data: LabelledData, folds: bool) -> list[LabelledData]:
    """One copy of `data` for each of STL-10's ten folds if `folds`, else [data]."""
    if folds and (data.labels or data.fold >= 0):
        raise UserError("--folds: all labels of each fold are used; leave out --labels and --fold")
    return [dataclasses.replace(data, fold=f) for f in range(10)] if folds else [data]


def label_draw(labels: np.ndarray, count: int, draw: int) -> np.ndarray:
    """Sorted indices of `count` labels, equally many of each class.

    Fewer labels are a subset of more with the same `draw`.

    count   a multiple of the number of classes; 0 or len(labels) for all, equally many or not
    """
    if count in (0, len(labels)):
        return np.arange(len(labels))
    classes = np.unique(labels)
    each = count // len(classes)
    least = min(np.sum(labels == c) for c in classes)
    if count % len(classes) or each > least:
        raise UserError(
            f"--labels {count}: must be a multiple of {len(classes)} classes, and at most "
            f"{least * len(classes)} (the smallest class has {least})"
        )
    rng = np.random.default_rng(np.random.SeedSequence([draw, 0x1ABE1]))
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]
    return np.sort(np.concatenate(chosen))


def evaluation(dataset: Dataset, data: LabelledData) -> Split:
    """The train images of a fold or a label draw, and the images to evaluate on."""
    splits = ("train", "test") if data.evaluate_on == "test" else ("train",)
    if missing := [split for split in splits if getattr(dataset, split) is None]:
        raise UserError(
            f"this data set has no labelled {' and '.join(missing)} images: "
            f"--data-root needs {' and '.join(f'{split}/CLASS/*' for split in missing)}"
        )
    if len(dataset.class_names) < 2:
        raise UserError(
            f"this data set has only the class {dataset.class_names[0]!r}: "
            "classification needs at least two; add a folder in train/ of --data-root"
        )
    if data.fold >= 0:
        if dataset.folds is None:
            raise UserError(f"--fold {data.fold} (--folds): only stl10 has folds")
        if data.labels:
            raise UserError(f"--fold {data.fold}: all its labels are used; leave out --labels")
        chosen = dataset.folds[data.fold]
    else:
        chosen = label_draw(dataset.train_labels, data.labels, data.draw)
    everything = Labelled(
        dataset.train, dataset.train_labels, np.arange(len(dataset.train)), dataset.class_names
    )
    train = everything.part(chosen)
    if data.evaluate_on == "test":
        test = Labelled(dataset.test, dataset.test_labels, None, dataset.class_names)
        return Split(train, test)
    rest = np.setdiff1d(everything.index, chosen)
    if not len(rest):
        used = f"--labels {data.labels}" if data.labels else "training without --labels"
        raise UserError(f"--evaluate-on validation: {used} leaves no labelled image to evaluate on")
    return Split(train, everything.part(rest))
