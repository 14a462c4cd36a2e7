"""The results table: cells, rows with spread, claims as paired differences, text."""

import itertools
import json
import math
from pathlib import Path

import numpy as np

from core.errors import printable
from eval.protocols import PROTOCOLS

# 97.5 % quantiles of Student's t for 1 .. 30 degrees of freedom
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

# Named before any figure was seen; printed whatever their sign.
CLAIMS = (
    ("{m}-finetune", "baseline", "what pretraining gives a network trained on the same labels"),
    ("{m}-linear", "random-encoder", "what the features are worth beyond the architecture"),
    ("{m}-linear", "raw-pixels", "what the features are worth beyond the pixels"),
)
KEY = ("name", "init", "labels", "draw", "seed")


class Cells:
    """One measured figure a line in cells.jsonl, so that an interrupted run goes on.

    A cell is {name, init, labels, draw, seed, top1, seconds, protocol, test_images}.
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path, self.write, self.cells = path, write, {}
        text = path.read_bytes() if path.exists() else b""
        if write and text and not text.endswith(b"\n"):  # the next cell gets a line of its own
            path.write_bytes(text + b"\n")
        for line in text.splitlines():
            try:
                cell = json.loads(line)
                self.cells[tuple(cell[k] for k in KEY)] = cell
            except (ValueError, KeyError, TypeError):  # cut short by a crash: measured again
                continue

    def __contains__(self, key: tuple) -> bool:
        return key in self.cells

    def add(self, key: tuple, **values) -> dict:
        """Keep a cell, in memory and on the disk."""
        cell = dict(zip(KEY, key, strict=True)) | values
        self.cells[key] = cell
        if self.write:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")
        return cell

    def matrix(self, name: str, init: str, labels: int) -> tuple[np.ndarray, list[int]]:
        """Top-1 of one row and budget, (seeds, draws), and the numbers of the draws.

        Draws that a seed lacks (of an interrupted run) are left out.
        """
        found = {
            (c["seed"], c["draw"]): c["top1"]
            for c in self.cells.values()
            if (c["name"], c["init"], c["labels"]) == (name, init, labels)
        }
        seeds = sorted({s for s, _ in found})
        draws = [d for d in sorted({d for _, d in found}) if all((s, d) in found for s in seeds)]
        return np.array([[found[s, d] for d in draws] for s in seeds]), draws

    def rows(self) -> list[dict]:
        """Each row and budget: mean over seeds and draws, std over draws of the seeds' mean."""
        table, done = [], set()
        for cell in self.cells.values():
            key = tuple(cell[k] for k in KEY[:3])
            if key in done:
                continue
            done.add(key)
            values, _ = self.matrix(*key)
            if not values.size:
                continue
            same = [c for c in self.cells.values() if tuple(c[k] for k in KEY[:3]) == key]
            per_draw = values.mean(0)
            spread = round(float(per_draw.std(ddof=1)), 3) if len(per_draw) > 1 else None
            row = dict(zip(KEY, key, strict=False), protocol=cell["protocol"])
            row |= {"top1_mean": round(float(per_draw.mean()), 3), "top1_std": spread}
            row |= {"draws": values.shape[1], "pretrain_seeds": values.shape[0]}
            seconds = round(float(np.mean([c["seconds"] for c in same])), 2)
            table.append(row | {"test_images": cell["test_images"], "seconds": seconds})
        return table

    def claims(self, method: str) -> list[dict]:
        """The claims as paired differences over the draws (and seeds) that both rows have."""
        inits = sorted({c["init"] for c in self.cells.values() if c["name"].startswith(method)})
        budgets = sorted({c["labels"] for c in self.cells.values()})
        found = []
        for init, labels, (ours, control, meaning) in itertools.product(inits, budgets, CLAIMS):
            ours = ours.format(m=method)
            a, a_draws = self.matrix(ours, init, labels)
            b, b_draws = self.matrix(control, init, labels)
            if not b.size:  # a control without a start of its own stands for every init
                b, b_draws = self.matrix(control, "none", labels)
            both = [d for d in a_draws if d in b_draws]
            if not both:
                continue
            a, b = a[:, [a_draws.index(d) for d in both]], b[:, [b_draws.index(d) for d in both]]
            difference = a - (b if len(a) == len(b) else b.mean(0, keepdims=True))
            mean, half = paired_interval(difference)
            interval = None if half is None else [round(mean - half, 3), round(mean + half, 3)]
            claim = {"claim": f"{ours} - {control}", "meaning": meaning}
            claim |= {"init": init, "labels": labels, "difference": round(mean, 3)}
            claim |= {"interval": interval, "draws": len(both), "pretrain_seeds": len(a)}
            found.append(claim)
        return found


def paired_interval(difference: np.ndarray) -> tuple[float, float | None]:
    """Mean and half width of the 95 % interval of paired differences (seeds, draws).

    Draws and pretraining seeds are both random: their variances of the mean add, with Student's t
    at Satterthwaite's degrees of freedom.  With one seed only the draws' is known; with one draw
    and one seed there is no interval.
    """
    parts = []
    for axis in (0, 1):
        means = difference.mean(axis)
        if len(means) > 1:
            parts.append((means.var(ddof=1) / len(means), len(means) - 1))
    if not parts:
        return float(difference.mean()), None
    variance = sum(v for v, _ in parts)
    if variance == 0:  # all the same, as where every draw takes all labels
        return float(difference.mean()), None
    freedom = variance**2 / sum(v**2 / f for v, f in parts)
    t = T975[max(1, min(30, math.floor(freedom))) - 1]
    return float(difference.mean()), float(t * math.sqrt(variance))


def plain(text: str, most: int = 9999, signs: str = "") -> str:
    """`text` on one line: unprintable characters and `signs` escaped, a long middle left out."""
    text = "".join(f"\\u{ord(c):04x}" if c in signs else c for c in printable(text))
    text = " " * text.startswith("_") + text  # matplotlib's legends leave out what begins with _
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def markdown(rows: list[dict], claims: list[dict], title: str, notes: list[str]) -> str:
    """The table as text: one line a row, one column a label budget."""
    budgets = sorted({r["labels"] for r in rows})
    lines = [f"# {plain(title)}", "", *map(plain, notes), ""]
    heads = " | ".join(f"{b:,} labels" for b in budgets)
    lines += [f"| row | init | {heads} | draws x seeds | seconds | protocol |"]
    lines += ["|---|---|" + "---|" * len(budgets) + "---|---|---|"]
    for name, init in dict.fromkeys((r["name"], r["init"]) for r in rows):
        mine = {r["labels"]: r for r in rows if (r["name"], r["init"]) == (name, init)}
        first = next(iter(mine.values()))
        figures = []
        for budget in budgets:
            r = mine.get(budget)
            spread = "" if not r or r["top1_std"] is None else f" ± {r['top1_std']:.1f}"
            figures.append(f"{r['top1_mean']:.1f}{spread}" if r else "")
        count = f"{first['draws']} x {first['pretrain_seeds']}"
        cells = [name, init, *figures, count, f"{first['seconds']:.1f}", first["protocol"]]
        lines.append("| " + " | ".join(plain(cell, signs="|`") for cell in cells) + " |")
    lines += ["", "Top-1 in percent, mean ± standard deviation over label draws.", ""]
    for name in sorted({r["protocol"] for r in rows}):
        if p := PROTOCOLS.get(name):
            lines += [f"- {name}: {p.features}; {p.solver}; chosen: {p.chosen}"]
    lines += [""]
    if any(c["pretrain_seeds"] == 1 for c in claims):
        lines += [
            "One pretraining seed: the intervals hold the variance over label draws alone. Another "
            "seed may give another answer; three tell (`--reproduce.seeds 3`).",
            "",
        ]
    if claims:
        lines += [
            "| claim, named beforehand | init | labels | difference | 95 % interval "
            "| draws x seeds | holds |",
            "|---|---|---|---|---|---|---|",
        ]
    for c in claims:
        interval = c["interval"]
        text = f"{interval[0]:+.2f} to {interval[1]:+.2f}" if interval else "one draw: none"
        holds = "not shown"
        if interval and (interval[0] > 0 or interval[1] < 0):
            holds = "yes" if interval[0] > 0 else "no, the opposite"
            holds += ", over these draws" * (c["pretrain_seeds"] == 1)
        cells = [f"{c['claim']} ({c['meaning']})", c["init"], f"{c['labels']:,}"]
        cells += [f"{c['difference']:+.2f}", text, f"{c['draws']} x {c['pretrain_seeds']}", holds]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
