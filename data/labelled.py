"""Few labels: draws, folds, held-out images; what is learned from and what is measured on."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from core.errors import UserError
from data.datasets import Dataset, LabelledData
from data.images import Images


@dataclass
class Labelled:
    """Images with their labels.  What chooses a setting gets one of these and no test images.

    index   which of the labelled train images they are; None: they are test images
    """

    images: Images
    labels: np.ndarray
    index: np.ndarray | None
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: np.ndarray) -> "Labelled":
        """The rows named."""
        images, labels = self.images.subset(rows), self.labels[rows]
        return Labelled(images, labels, self.index[rows], self.class_names)

    def hold_out(self) -> "Split":
        """Four stratified fifths to learn from and one to choose settings on, inside these.

        The only image of a class is learned from.
        """
        if self.index is None:
            raise ValueError("settings are never chosen on test images")
        if np.unique(self.labels, return_counts=True)[1].max() < 2:
            raise UserError("nothing to choose settings on: each class has one labelled image")
        held = stratified_folds(self.labels, 5)[0]
        return Split(self.part(np.setdiff1d(np.arange(len(self)), held)), self.part(held))


@dataclass
class Split:
    """What is learned from, and what is measured on."""

    train: Labelled
    test: Labelled


def stratified_folds(labels: np.ndarray, count: int, seed: int = 0) -> list[np.ndarray]:
    """Folds with the classes in equal shares: which rows are held out in each.

    The only row of a class is in none of them.
    """
    rng, fold = np.random.default_rng(seed), np.empty(len(labels), np.int64)
    for c in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == c))
        fold[rows] = np.arange(len(rows)) % count if len(rows) > 1 else -1
    return [np.flatnonzero(fold == f) for f in range(count)]


def each_fold(data: LabelledData, folds: bool) -> list[LabelledData]:
    """The settings for each of STL-10's ten folds, or `data` alone."""
    if folds and (data.labels or data.fold >= 0):
        raise UserError("--folds: all labels of each fold are used; leave out --labels and --fold")
    return [dataclasses.replace(data, fold=f) for f in range(10)] if folds else [data]


def label_draw(labels: np.ndarray, count: int, draw: int) -> np.ndarray:
    """Sorted indices of `count` labels, equally many of each class; draws are nested in count.

    count   0 or their number for all; else a multiple of the classes, at most what there is
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
    """The labelled images that may be used and those that are measured on."""
    wanted = {"train": dataset.train} | (
        {"test": dataset.test} if data.evaluate_on == "test" else {}
    )
    if missing := [split for split, images in wanted.items() if images is None]:
        raise UserError(
            f"this data set has no labelled {' and '.join(missing)} images: "
            f"--data-root needs {' and '.join(f'{split}/CLASS/*' for split in missing)}"
        )
    if len(dataset.class_names) < 2:
        raise UserError(
            f"this data set has the class {dataset.class_names[0]!r} alone: "
            "there is nothing to tell apart; --data-root needs two folders in train/"
        )
    if data.fold >= 0:
        if dataset.folds is None:
            raise UserError(f"--fold {data.fold} (--folds): stl10 alone has folds")
        if data.labels:
            raise UserError(f"--fold {data.fold}: takes all its labels; leave out --labels")
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
        given = f"--labels {data.labels}" if data.labels else "without --labels, training"
        raise UserError(f"--evaluate-on validation: {given} leaves no labelled image over")
    return Split(train, everything.part(rest))
