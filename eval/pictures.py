"""Figures: accuracy of rows and methods, pretraining curves, confusion matrix, feature map."""

import math
import os
import warnings

import numpy as np

from data.decode import SOFTWARE
from eval.table import KINDS, plain

os.environ.pop("MPLBACKEND", None)  # matplotlib's import fails on a backend that isn't installed
import matplotlib.style
from matplotlib.figure import Figure

STYLE = {
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "errorbar.capsize": 3,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "tau": "tau",
    "knn_top1": "k-NN top-1, %",
    "std/representation": "std per dimension, representation",
    "rank/representation": "effective rank, representation",
    "std/projection": "std per dimension, projection",
    "rank/projection": "effective rank, projection",
}


def save(file, draw, *arguments) -> None:
    """Write the figure `draw(*arguments)` as a PNG into `file`, a path or a file object.

    Style is matplotlib's default and STYLE, whatever the user's settings.  The metadata tells the
    folder data set that the PNG is not one of its images.
    """
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing|Matplotlib currently does not support")
        figure = draw(*arguments)
        figure.savefig(file, dpi=144, format="png", metadata={"Software": SOFTWARE})


def label(name: str) -> str:
    """`name` shortened; a space before `_`, since legends leave out names that begin with it."""
    name = plain(name, 40)
    return f" {name}" if name.startswith("_") else name


def accuracy_figure(rows: list[dict], title: str = "") -> Figure:
    """Top-1 of the rows of results.json, with one panel for each label budget."""
    points, inits = [], {row["init"] for row in rows} - {"none"}
    for row in rows:
        several = row["init"] != "none" and len(inits) > 1
        name = f"{row['name']} ({row['init']})" if several else row["name"]
        point = {"name": name, "kind": "", "labels": row["labels"]}
        points.append(point | {"top1": row["top1_mean"], "std": row["top1_std"]})
    return dots_figure(points, title)


def dots_figure(rows: list[dict], title: str = "") -> Figure:
    """Top-1 and error bar of each row {name, kind, labels, top1, std}, the best name on top.

    One panel for each label budget, one marker for each kind of classifier.
    """
    budgets, kinds = sorted({row["labels"] for row in rows}), sorted({row["kind"] for row in rows})
    top1 = {}
    for row in sorted(rows, key=lambda row: (row["labels"], row["kind"])):
        top1[row["name"]] = row["top1"]  # kept from the last row: linear, largest budget
    names = sorted(top1, key=top1.get)
    figure = Figure(figsize=(2 + 3 * len(budgets), 1.5 + 0.3 * len(names)))
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for axes, labels in zip(panels, budgets, strict=True):
        for i, kind in enumerate(kinds):
            group = [row for row in rows if (row["kind"], row["labels"]) == (kind, labels)]
            x, error = [row["top1"] for row in group], [row["std"] or 0 for row in group]
            y = [names.index(row["name"]) + 0.2 * (i - (len(kinds) - 1) / 2) for row in group]
            axes.errorbar(x, y, xerr=error, fmt="os"[i], label=KINDS.get(kind))
        axes.set_yticks(range(len(names)), [label(name) for name in names])
        axes.set_ylim(-0.5, len(names) - 0.5)
        axes.set_xlabel("top-1, %")
        axes.set_title(f"{labels:,} labels")
    figure.suptitle(plain(title, 80), wrap=True)
    if len(kinds) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")
    return figure


def curves_figure(runs: dict[str, list[dict]]) -> Figure:
    """The logged metrics of CURVES over the steps; `runs`: name -> rows of metrics.jsonl."""
    logged = {key for rows in runs.values() for row in rows for key in row}
    shown = [key for key in CURVES if key in logged]
    down = math.ceil(len(shown) / 3) or 1
    figure = Figure(figsize=(11, 3 * down))
    for number, key in enumerate(shown, 1):
        axes = figure.add_subplot(down, 3, number)
        for name, rows in runs.items():
            rows = [row for row in rows if key in row]
            steps, values = [row["step"] + 1 for row in rows], [row[key] for row in rows]
            axes.plot(steps, values, label=label(name))
        axes.set_title(CURVES[key])
        axes.set_xlabel("step")
    if shown:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def confusion_figure(truth, guess, names: list[str]) -> Figure:
    """Confusion matrix in percent of each true class, for the 25 classes of lowest accuracy.

    truth, guess   true and predicted classes, integers (N,)
    """
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (truth, guess), 1)
    share = 100 * counts / counts.sum(1, keepdims=True).clip(1)
    tested = np.flatnonzero(counts.sum(1))
    shown = np.sort(tested[np.argsort(share.diagonal()[tested], kind="stable")[:25]])
    share, names = share[shown][:, shown], [label(names[i]) for i in shown]
    axes = Figure(figsize=(8, 7)).subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for row, column in zip(*np.nonzero(share >= 0.5), strict=True):
        color = "white" if share[row, column] > 55 else "black"
        style = dict(ha="center", va="center", fontsize=8, color=color)
        axes.text(column, row, f"{share[row, column]:.0f}", **style)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    axes.grid(False)
    return axes.figure


def map_figure(points, labels, names: list[str]) -> Figure:
    """Points (N, 2) colored by class, with a legend for at most 20 classes."""
    axes = Figure(figsize=(8, 6)).subplots()
    colors = matplotlib.colormaps["tab10" if len(names) <= 10 else "turbo"].resampled(len(names))
    for number, name in enumerate(names):
        x, y = points[labels == number].T
        axes.scatter(x, y, s=7, color=colors(number), label=label(name))
    if len(names) <= 20:
        axes.figure.legend(loc="outside right center", markerscale=2)
    axes.set_axis_off()
    return axes.figure
