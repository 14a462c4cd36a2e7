"""Pictures of results: accuracy against labels, what pretraining looked like, methods compared."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


def save(figure: Figure, path: Path) -> None:
    """As a PNG."""
    figure.savefig(path, dpi=144)
    plt.close(figure)


def accuracy_figure(rows: list[dict], title: str = "") -> Figure:
    """Accuracy against labels with error bars, all rows of a results table."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
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
        ends.append([y[-1], x[-1], label, line[0].get_color()])
    _spread(ends, gap=(axes.get_ylim()[1] - axes.get_ylim()[0]) / 26)
    right = max(r["labels"] for r in rows)
    for y, _, label, colour in ends:
        axes.annotate(
            label, (right * 1.12, y), color=colour, va="center", fontsize=9, annotation_clip=False
        )
    axes.set_xscale("log")
    budgets = sorted({r["labels"] for r in rows})
    axes.set_xticks(budgets, [f"{b:,}" for b in budgets])
    axes.minorticks_off()
    axes.set_xlim(right=right * (1.9 if len(budgets) == 1 else (right / budgets[0]) ** 0.45 * 1.1))
    axes.set_xlabel("labelled images")
    axes.set_ylabel("top-1, %")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    return figure


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


def curves_figure(runs: dict[str, list[dict]]) -> Figure:
    """Those of CURVES that were logged, over the steps; `runs` are rows of metrics by name."""
    logged = {key for rows in runs.values() for row in rows for key in row}
    shown = {title: keys for title, keys in CURVES.items() if logged & set(keys)}
    down = -(-len(shown) // 3)
    figure, panels = plt.subplots(
        down, 3, figsize=(11, 3 * down), squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (title, keys) in zip(panels.flat, shown.items(), strict=False):
        for number, rows in enumerate(runs.values()):
            for key, style in zip(keys, ("-", "--"), strict=False):
                points = [(r["step"] + 1, r[key]) for r in rows if key in r]
                steps, values = zip(*points, strict=True) if points else ((), ())
                axes.plot(steps, values, style, color=f"C{number}", lw=1.4)
        if len(keys) > 1:
            handles = [plt.Line2D([], [], color="grey", ls=style) for style in ("-", "--")]
            axes.legend(handles, [k.split("/")[1] for k in keys], frameon=False, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    if len(runs) > 1:
        handles = [plt.Line2D([], [], color=f"C{i}") for i in range(len(runs))]
        figure.legend(handles, runs, loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return figure


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
    figure, panels = plt.subplots(
        1, len(budgets), figsize=(4.6 * len(budgets), 3.6), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
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
                axes.annotate(
                    f"{r['name']} ", (r["top1"], len(order) - 0.5), rotation=90, ha="right",
                    va="top", fontsize=8, color="grey",
                )  # fmt: skip
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(-0.5, len(order) - 0.4)
        axes.set_xlabel("top-1, %")
        axes.set_title(f"{labels:,} labels", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    panels[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def confusion_figure(truth, guess, names: list[str]) -> Figure:
    """Confusion in percent of each true class, and each class's accuracy; integer arrays (N,).

    More than 25 classes go without names and numbers; the bars are then the worst ones'.
    """
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (truth, guess), 1)
    share, few = 100 * counts / counts.sum(1, keepdims=True).clip(1), len(names) <= 25
    side = min(9.0, max(4.0, 0.42 * len(names) + 1.5))
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * side, side), layout="constrained")
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
    right.spines[["top", "right"]].set_visible(False)
    right.grid(axis="x", alpha=0.3)
    return figure


def map_figure(points, labels, names: list[str]) -> Figure:
    """Points (N, 2) coloured by class; the legend ends at 20 classes."""
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    colours = plt.get_cmap("tab10" if len(names) <= 10 else "turbo", len(names))
    for number, name in enumerate(names):
        mine = points[labels == number]
        axes.scatter(mine[:, 0], mine[:, 1], s=7, color=colours(number), label=name)
    if len(names) <= 20:
        place = dict(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2)
        axes.legend(frameon=False, fontsize=8, **place)
    axes.set_axis_off()
    return figure
