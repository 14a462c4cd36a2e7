"""Tables of results: measured cells, their means and spread, paired differences, Markdown."""

import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.errors import printable
from core.files import read_json_lines, write_atomically
from eval.protocols import PROTOCOLS

CONTROLS = ("raw-pixels", "random-encoder")
KINDS = {"linear": "linear", "knn": "k-NN"}  # classifiers in a table of methods

# (row, control, meaning): fixed before any result was seen, and printed whatever their sign.
CLAIMS = (
    ("{m}-finetune", "baseline", "what pretraining gives a network trained on the same labels"),
    ("{m}-linear", "random-encoder", "what the features are worth beyond the architecture"),
    ("{m}-linear", "raw-pixels", "what the features are worth beyond the pixels"),
)
ONE_SEED = (
    "One pretraining seed: the intervals hold the variance over label draws alone. Another seed "
    "may give another answer; run at least three (`--reproduce.seeds 3`)."
)
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom
QUANTILES = """
    12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131
    2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042
"""
T975 = [float(quantile) for quantile in QUANTILES.split()]


class Key(NamedTuple):
    """Identifies a cell: row, initial weights, label budget, label draw, pretraining seed."""

    name: str
    init: str
    labels: int
    draw: int
    seed: int


class Cells:
    """The measured cells of a table.  Each is a line of cells.jsonl, so that a stopped run resumes.

    A cell is {name, init, labels, draw, seed, top1, seconds, protocol, test_images}.

    write   whether `add` also writes the file
    """

    def __init__(self, path: Path, write: bool) -> None:
        self.path, self.write, self.cells = path, write, {}
        for cell in read_json_lines(path):
            if cell.keys() >= set(Key._fields):
                self.cells[Key(*(cell[name] for name in Key._fields))] = cell

    def __contains__(self, key: Key) -> bool:
        return key in self.cells

    def add(self, key: Key, **values) -> None:
        """Store a cell, and write all of them to the file."""
        self.cells[key] = dict(zip(Key._fields, key, strict=True)) | values
        if self.write:
            lines = [json.dumps(cell) + "\n" for cell in self.cells.values()]
            write_atomically(self.path, "".join(lines).encode())

    def matrix(self, name: str, init: str, labels: int) -> tuple[np.ndarray, list[int]]:
        """Top-1 (seeds, draws) of one row at one label budget, and the draws' numbers.

        In an unfinished table, a draw that some seed has no cell for is left out.
        """
        row = (name, init, labels)
        seeds = sorted({seed for *key, _, seed in self.cells if tuple(key) == row})
        draws = sorted({draw for *key, draw, _ in self.cells if tuple(key) == row})
        draws = [draw for draw in draws if all((*row, draw, seed) in self for seed in seeds)]
        top1 = [[self.cells[*row, draw, seed]["top1"] for draw in draws] for seed in seeds]
        return np.array(top1), draws

    def rows(self) -> list[dict]:
        """The rows of results.json; their std is over label draws, of the mean over seeds."""
        rows = []
        for row_key in dict.fromkeys(key[:3] for key in self.cells):
            cells = [cell for key, cell in self.cells.items() if key[:3] == row_key]
            top1, draws = self.matrix(*row_key)
            if not draws:
                continue
            mean, std = mean_and_std(top1.mean(0))
            seconds = float(np.mean([cell["seconds"] for cell in cells]))
            row = {k: cells[0][k] for k in ("name", "init", "labels", "protocol")}
            row |= {"top1_mean": round(mean, 3), "top1_std": None if std is None else round(std, 3)}
            row |= {"draws": len(draws), "pretrain_seeds": len(top1)}
            row |= {"test_images": cells[0]["test_images"], "seconds": round(seconds, 2)}
            rows.append(row)
        return rows

    def claims(self, method: str) -> list[dict]:
        """CLAIMS as paired differences over the draws (and seeds) that both rows have."""
        inits = sorted({c["init"] for c in self.cells.values() if c["name"].startswith(method)})
        budgets = sorted({c["labels"] for c in self.cells.values()})
        claims = []
        for init, labels, (name, control, meaning) in itertools.product(inits, budgets, CLAIMS):
            name = name.format(m=method)
            a, a_draws = self.matrix(name, init, labels)
            b, b_draws = self.matrix(control, init, labels)
            if not b_draws:  # a control that does not depend on the init
                b, b_draws = self.matrix(control, "none", labels)
            draws, in_a, in_b = np.intersect1d(a_draws, b_draws, return_indices=True)
            if not len(draws):
                continue
            a, b = a[:, in_a], b[:, in_b]
            difference = a - (b if len(a) == len(b) else b.mean(0, keepdims=True))
            mean, half = paired_interval(difference)
            interval = None if half is None else [round(mean - half, 3), round(mean + half, 3)]
            claim = {"claim": f"{name} - {control}", "meaning": meaning, "init": init}
            claim |= {"labels": labels, "difference": round(mean, 3), "interval": interval}
            claims.append(claim | {"draws": len(draws), "pretrain_seeds": len(a)})
        return claims


def mean_and_std(values: np.ndarray) -> tuple[float, float | None]:
    """Mean and sample standard deviation (N - 1); the latter is None for a single value."""
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def paired_interval(difference: np.ndarray) -> tuple[float, float | None]:
    """Mean and half width of the 95 % interval of paired differences (seeds, draws).

    Seeds and draws are both random: the variance of the mean is the sum of the variances over each,
    with Student's t at Satterthwaite's degrees of freedom.  With one seed it is that over draws
    alone; with one draw and one seed there is no interval (None).
    """
    parts = []
    for axis in (0, 1):
        means = difference.mean(axis)
        if len(means) > 1:
            parts.append((means.var(ddof=1) / len(means), len(means) - 1))
    variance = sum(v for v, _ in parts)
    if variance == 0:  # one value, or equal ones, as when every draw takes all labels
        return float(difference.mean()), None
    freedom = variance**2 / sum(v**2 / f for v, f in parts)
    t = T975[max(1, min(30, math.floor(freedom))) - 1]
    return float(difference.mean()), float(t * math.sqrt(variance))


def method_rows(cells: Cells, name: str, budgets: list[int], rate: float | None) -> list[dict]:
    """Rows of a method or control in methods.json: mean and std over seeds of the mean over draws.

    rate   training images per second
    """
    control, rows = name in CONTROLS, []
    for kind in ("linear",) if control else KINDS:
        row_name, init = (name, "none") if control else (f"{name}-{kind}", "random")
        for labels in budgets:
            seeds = cells.matrix(row_name, init, labels)[0].mean(1)
            mean, std = mean_and_std(seeds)
            row = {"name": name, "kind": kind, "labels": labels, "top1": mean, "std": std}
            rows.append(row | {"seeds": len(seeds), "images_per_second": rate})
    return rows


def plain(text: str, most: int = 9999, signs: str = "") -> str:
    """`text` on one line: unprintable characters and `signs` escaped, a long middle left out."""
    text = "".join(f"\\u{ord(c):04x}" if c in signs else c for c in printable(text))
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def markdown(rows: list[dict], claims: list[dict], title: str, notes: list[str]) -> str:
    """The text of results.md: title, notes, a line for each row, protocols, claims."""
    lines = [f"# {plain(title)}", "", *map(plain, notes), "", _results_table(rows)]
    lines += ["Top-1 in percent, mean ± standard deviation over label draws.", ""]
    for name in sorted({row["protocol"] for row in rows}):
        if name in PROTOCOLS:
            lines.append(f"- {name}: {PROTOCOLS[name]}")
    lines.append("")
    if any(claim["pretrain_seeds"] == 1 for claim in claims):
        lines += [ONE_SEED, ""]
    if claims:
        lines.append(_claims_table(claims))
    return "\n".join(lines)


def methods_markdown(rows: list[dict]) -> str:
    """The text of methods.md: a line for each method, a column for each classifier and budget."""
    columns, lines = {_head(row): "" for row in rows}, {}
    for row in rows:
        rate = row["images_per_second"]
        line = {"method": row["name"], **columns, "seeds": f"{row['seeds']}"}
        line = lines.setdefault(row["name"], line | {"images/s": f"{rate:,.0f}" if rate else ""})
        line[_head(row)] = _percent(row["top1"], row["std"])
    return _table(list(lines.values()))


def _results_table(rows: list[dict]) -> str:
    """A line for each row, a column for each label budget."""
    rows, lines = sorted(rows, key=lambda row: row["labels"]), []
    columns = {_head(row): "" for row in rows}
    for name, init in dict.fromkeys((row["name"], row["init"]) for row in rows):
        budgets = [row for row in rows if (row["name"], row["init"]) == (name, init)]
        line = {"row": name, "init": init, **columns}
        line |= {_head(row): _percent(row["top1_mean"], row["top1_std"]) for row in budgets}
        facts = {
            "draws x seeds": [f"{row['draws']} x {row['pretrain_seeds']}" for row in budgets],
            "seconds": [f"{row['seconds']:.1f}" for row in budgets],
            "protocol": [row["protocol"] for row in budgets],
        }
        for fact, values in facts.items():  # that of each budget, where they differ
            line[fact] = ", ".join(values if len(set(values)) > 1 else values[:1])
        lines.append(line)
    return _table(lines)


def _head(row: dict) -> str:
    """The column's head: the label budget, with the classifier before it in a table of methods."""
    labels = f"{row['labels']:,} labels"
    return f"{KINDS[row['kind']]}, {labels}" if "kind" in row else labels


def _claims_table(claims: list[dict]) -> str:
    """A line for each claim, with its interval and whether it holds."""
    lines = []
    for claim in claims:
        one = claim["draws"] * claim["pretrain_seeds"] == 1
        interval, holds = f"none: {'one draw' if one else 'equal differences'}", "not shown"
        if claim["interval"]:
            low, high = claim["interval"]
            interval = f"{low:+.2f} to {high:+.2f}"
            if low > 0 or high < 0:
                holds = "yes" if low > 0 else "no, the opposite"
                if claim["pretrain_seeds"] == 1:
                    holds += ", over these draws"
        line = {"claim, named beforehand": f"{claim['claim']} ({claim['meaning']})"}
        line |= {"init": claim["init"], "labels": f"{claim['labels']:,}"}
        line |= {"difference": f"{claim['difference']:+.2f}", "95 % interval": interval}
        line["draws x seeds"] = f"{claim['draws']} x {claim['pretrain_seeds']}"
        lines.append(line | {"holds": holds})
    return _table(lines)


def _percent(mean: float, std: float | None) -> str:
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _table(lines: list[dict[str, str]]) -> str:
    """A Markdown table of lines {head: cell}; characters with a meaning there are escaped."""
    text = f"| {' | '.join(lines[0])} |\n" + "|---" * len(lines[0]) + "|\n"
    for line in lines:
        text += f"| {' | '.join(plain(cell, signs='|`') for cell in line.values())} |\n"
    return text
