"""Pictures of results: accuracy against labels, what pretraining looked like, methods compared."""

import contextlib
import os
import warnings
from pathlib import Path

import numpy as np

from data.decode import SOFTWARE
from eval.table import plain

os.environ.pop("MPLBACKEND", None)  # matplotlib's import fails where it isn't installed
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

DARK = Path(matplotlib.get_data_path(), "stylelib/dark_background.mplstyle")
STYLE = {"text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False}


@contextlib.contextmanager
def own_style(dark: bool = False):
    """Draw with STYLE and matplotlib's defaults or dark style, whatever the user's settings."""
    with matplotlib.style.context(["default", *[DARK] * dark, STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing|Matplotlib currently does not support")
        yield


@own_style()
def save(figure: Figure, path: Path) -> None:
    """As a PNG, which the folder data set knows by its metadata."""
    figure.savefig(path, dpi=144, format="png", metadata={"Software": SOFTWARE})


@own_style()
def accuracy_figure(rows: list[dict], title: str = "") -> Figure:
    """Accuracy against labels with error bars, all rows of a results table."""
    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    names = list(dict.fromkeys((r["name"], r["init"]) for r in rows))
    several = len({init for _, init in names if init != "none"}) > 1
    ends = []
    for i, (name, init) in enumerate(names):
        mine = sorted(
            (r for r in rows if (r["name"], r["init"]) == (name, init)), key=lambda r: r["labels"]
        )
        # a small sideways shift keeps error bars apart
        x = [r["labels"] * 1.015 ** (i - len(names) / 2) for r in mine]
        y, error = [r["top1_mean"] for r in mine], [r["top1_std"] or 0 for r in mine]
        label = f"{name} ({init})" if several and init != "none" else name
        control = name in ("raw-pixels", "random-encoder", "imagenet-features", "baseline")
        style = dict(capsize=3, marker="o", ms=4, lw=1.6, ls="--" if control else "-")
        line = axes.errorbar(x, y, error, color=f"C{i}", **style)
        ends.append([y[-1], x[-1], plain(label, 60), line[0].get_color()])
    _spread(ends, gap=(axes.get_ylim()[1] - axes.get_ylim()[0]) / 26)
    right = max(r["labels"] for r in rows)
    for y, _, label, colour in ends:
        axes.text(right * 1.12, y, label, color=colour, va="center", fontsize=9)
    axes.set_xscale("log")
    budgets = sorted({r["labels"] for r in rows})
    axes.set_xticks(budgets, [f"{b:,}" for b in budgets])
    axes.minorticks_off()
    axes.set_xlim(right=right * (1.9 if len(budgets) == 1 else (right / budgets[0]) ** 0.45 * 1.1))
    axes.set_xlabel("labelled images")
    axes.set_ylabel("top-1, %")
    axes.set_title(plain(title, 80))
    axes.grid(axis="y", alpha=0.3)
    return axes.figure


def _spread(ends: list[list], gap: float) -> None:
    """Move labels that stand at the line ends apart, upwards from the lowest."""
    ends.sort()
    for below, above in zip(ends, ends[1:], strict=False):
        above[0] = max(above[0], below[0] + gap)


CURVES = {
    "loss": ("loss",),
    "learning rate": ("lr",),
    "tau": ("tau",),
    "k-NN top-1, %": ("knn_top1",),
    "std per dimension": ("std/representation", "std/projection"),
    "effective rank": ("rank/representation", "rank/projection"),
}


@own_style()
def curves_figure(runs: dict[str, list[dict]]) -> Figure:
    """Those of CURVES that were logged, over the steps; `runs` are rows of metrics by name."""
    logged = {key for rows in runs.values() for row in rows for key in row}
    shown = {title: keys for title, keys in CURVES.items() if logged & set(keys)}
    down = -(-len(shown) // 3)
    figure = Figure(figsize=(11, 3 * down), layout="constrained")
    panels = figure.subplots(down, 3, squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (title, keys) in zip(panels.flat, shown.items(), strict=False):
        for number, rows in enumerate(runs.values()):
            for key, style in zip(keys, ("-", "--"), strict=False):
                points = [(r["step"] + 1, r[key]) for r in rows if key in r]
                steps, values = zip(*points, strict=True) if points else ((), ())
                axes.plot(steps, values, style, color=f"C{number}", lw=1.4)
        if len(keys) > 1:
            handles = [Line2D([], [], color="grey", ls=style) for style in ("-", "--")]
            axes.legend(handles, [k.split("/")[1] for k in keys], frameon=False, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(axis="y", alpha=0.3)
    if len(runs) > 1:
        handles = [Line2D([], [], color=f"C{i}") for i in range(len(runs))]
        runs = [plain(run, 60) for run in runs]
        figure.legend(handles, runs, loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return figure


@own_style()
def methods_figure(rows: list[dict]) -> Figure:
    """Methods under one budget, best on top, a panel for each label budget; controls as lines.

    rows   {name, kind: linear | knn, labels, top1, std}; those without k-NN figures are controls
    """
    budgets = sorted({r["labels"] for r in rows})
    methods = {r["name"] for r in rows if r["kind"] == "knn"}
    best = {
        r["name"]: r["top1"] for r in rows if r["kind"] == "linear" and r["labels"] == budgets[-1]
    }
    order = sorted(methods, key=best.get)
    figure = Figure(figsize=(4.6 * len(budgets), 3.6), layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)
    for axes, labels in zip(panels[0], budgets, strict=True):
        for kind, marker, shift in (("linear", "o", 0.12), ("knn", "s", -0.12)):
            mine = {r["name"]: r for r in rows if (r["kind"], r["labels"]) == (kind, labels)}
            x, error = [mine[n]["top1"] for n in order], [mine[n]["std"] or 0 for n in order]
            y = [place + shift for place in range(len(order))]
            label = "k-NN" if kind == "knn" else kind
            axes.errorbar(x, y, xerr=error, fmt=marker, ms=5, capsize=3, label=label)
        for r in rows:
            if r["name"] not in methods and r["labels"] == labels:
                axes.axvline(r["top1"], color="grey", ls="--", lw=1)
                style = dict(rotation=90, ha="right", va="top", fontsize=8, color="grey")
                axes.text(r["top1"], len(order) - 0.5, f"{plain(r['name'], 32)} ", **style)
        axes.set_yticks(range(len(order)), [plain(name, 32) for name in order])
        axes.set_ylim(-0.5, len(order) - 0.4)
        axes.set_xlabel("top-1, %")
        axes.set_title(f"{labels:,} labels", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


@own_style()
def confusion_figure(truth, guess, names: list[str]) -> Figure:
    """Confusion in percent of each true class, and each class's accuracy; integer arrays (N,).

    More than 25 classes go without names and numbers; the bars are then the worst ones'.
    """
    names = [plain(name, 32) for name in names]
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (truth, guess), 1)
    share, few = 100 * counts / counts.sum(1, keepdims=True).clip(1), len(names) <= 25
    side = min(9.0, max(4.0, 0.42 * len(names) + 1.5))
    left, right = Figure(figsize=(2 * side, side), layout="constrained").subplots(1, 2)
    left.spines[:].set_visible(True)
    left.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for row, column in zip(*np.nonzero(share >= 0.5), strict=True) if few else ():
        colour = "white" if share[row, column] > 55 else "black"
        text = f"{share[row, column]:.0f}"
        left.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    ticks = range(len(names)) if few else ()
    left.set_xticks(ticks, [names[i] for i in ticks], rotation=45, ha="right")
    left.set_yticks(ticks, [names[i] for i in ticks])
    left.set_xlabel("predicted")
    left.set_ylabel("true")
    shown = ticks if few else np.argsort(share.diagonal(), kind="stable")[:25]
    right.barh(range(len(shown)), share.diagonal()[shown], color="C0")
    right.set_yticks(range(len(shown)), [names[i] for i in shown])
    right.invert_yaxis()
    right.set_xlim(0, 100)
    right.set_xlabel("accuracy of the class, %" + " (the 25 worst)" * (not few))
    right.grid(axis="x", alpha=0.3)
    return right.figure


@own_style()
def map_figure(points, labels, names: list[str]) -> Figure:
    """Points (N, 2) coloured by class; the legend ends at 20 classes."""
    axes = Figure(figsize=(8, 6), layout="constrained").subplots()
    colours = matplotlib.colormaps["tab10" if len(names) <= 10 else "turbo"].resampled(len(names))
    for number, name in enumerate(names):
        mine = points[labels == number]
        axes.scatter(mine[:, 0], mine[:, 1], s=7, color=colours(number), label=plain(name, 32))
    if len(names) <= 20:
        place = dict(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
        axes.legend(frameon=False, fontsize=8, **place)
    axes.set_axis_off()
    return axes.figure
