"""Pictures of a results table: accuracy against labels, and what pretraining looked like."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def accuracy_picture(rows: list[dict], path: Path, title: str) -> None:
    """Accuracy against labels with error bars, all rows, as a PNG."""
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
    figure.savefig(path, dpi=144)
    plt.close(figure)


def _spread(ends: list[list], gap: float) -> None:
    """Move labels that stand at the line ends apart, upwards from the lowest."""
    ends.sort()
    for below, above in zip(ends, ends[1:], strict=False):
        above[0] = max(above[0], below[0] + gap)


CURVES = {
    "k-NN top-1, %": ("knn_top1",),
    "std per dimension": ("std/representation", "std/projection"),
    "effective rank": ("rank/representation", "rank/projection"),
}


def curves_picture(runs: list[list[dict]], path: Path) -> None:
    """k-NN, std and rank over the steps of pretraining, as a PNG; `runs` are rows of metrics."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axes, (title, keys) in zip(panels, CURVES.items(), strict=True):
        for number, rows in enumerate(runs):
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
    figure.savefig(path, dpi=144)
    plt.close(figure)
