"""One self-contained report.html of runs: table, curves, mistakes, neighbours, a map of features.

python -m eval.report runs/sample                         # a folder of reproduce.py
python -m eval.report runs/byol-mine runs/baseline-mine   # runs of the scripts, with evaluations

Confusion, neighbours, map and mistakes are the first pretraining run's, and need its data.
Written into the first folder, anew each time, unless --out names another file.
"""

import argparse
import base64
import functools
import html
import io
import itertools
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from core.errors import UserError, one_line_errors
from core.files import new_file, read_json, write_atomically
from core.options import Parser
from data import datasets
from data.labelled import evaluation
from eval.classifiers import fit_linear
from eval.pictures import accuracy_figure, confusion_figure, curves_figure, map_figure, own_style
from eval.table import Cells, markdown
from eval.trained import load_frozen, tables_of
from training.run_folder import read_metrics
from training.weights import read_weights

QUERIES, NEIGHBOURS, MISTAKES, MAPPED, TILE = 8, 6, 24, 1000, 144
STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1f24;--soft:#57606a;--line:#d8dce2;
--good:#1a7f37;--bad:#c62f2f}
@media(prefers-color-scheme:dark){:root{--back:#111417;--text:#e6e8eb;--soft:#9aa3ad;--line:#31363d;
--good:#4cc26a;--bad:#ff7b72}}
body{background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif;margin:0 auto;
max-width:1080px;padding:1rem;overflow-wrap:anywhere}
h2{margin-top:2.5rem}figcaption,li{color:var(--soft);font-size:.875rem}img{max-width:100%}
.wide{overflow-x:auto;display:block}.wide img{min-width:640px}pre{overflow-x:auto;font-size:.75rem}
table{border-collapse:collapse;font-size:.875rem;overflow-wrap:normal}code{font-size:.8rem}
th,td{border-bottom:1px solid var(--line);padding:.35rem .7rem;text-align:left;vertical-align:top}
.tiles{display:flex;flex-wrap:wrap;gap:.5rem;margin:.25rem 0 1rem}
.tiles figure{margin:0;width:78px;font-size:.72rem;line-height:1.25}
.tiles img{width:72px;height:72px;border:3px solid var(--soft);image-rendering:pixelated}
.right img{border-color:var(--good)}.wrong img{border-color:var(--bad)}
"""


@dataclass
class Runs:
    """What was found: tables as Markdown, their rows, pretraining runs, what is measured on."""

    tables: list[str] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    pretraining: list[Path] = field(default_factory=list)
    measured: dict = field(default_factory=lambda: {"evaluate_on": "test", "draw": 0})


def find(folders: list[Path]) -> Runs:
    """UserError where no folder holds a finished run."""
    found, scripts = Runs(), {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run, or a folder of reproduce.py")
        files = [folder / "result.json", *sorted(folder.glob("*/result.json"))]
        results = {p.parent: read_json(p) for p in files if p.exists()}
        if "top1" in results.get(folder, {}):  # folds and sweeps inside are parts of it
            results = {folder: results[folder]}
        found.pretraining += [f for f, r in results.items() if "top1" not in r]
        if (folder / "results.json").exists():
            found.tables.append((folder / "results.md").read_text("utf-8", "replace"))
            found.rows += json.loads((folder / "results.json").read_bytes())
            settings = read_json(folder / "settings.json")
            on = settings["recipe"].get("data", {}).get("evaluate_on", "test")
            found.measured["evaluate_on"] = settings["flags"].get("data.evaluate_on", on)
            cells = Cells(folder / "cells.jsonl", False).cells.values()
            found.measured["draw"] = min(cell["draw"] for cell in cells)
        else:
            scripts |= {f: r for f, r in results.items() if "top1" in r}
    if scripts:
        rows = [_row(f, r, scripts) for f, r in scripts.items()]
        found.rows += rows
        notes = [line for f in scripts for line in (f"`{_command(f)}`", "")]
        found.tables.append(markdown(rows, [], "Runs", notes))
        last = max(scripts.values(), key=lambda result: result["labels"])
        found.measured = {"evaluate_on": last["measured_on"], "draw": last["draw"]}
    if not (found.rows or found.pretraining):
        raise UserError(f"{' '.join(map(str, folders))}: no finished run there")
    return found


def _row(folder: Path, result: dict, others: dict) -> dict:
    """A script's result.json as a row of the table; the folder tells apart what has one name."""
    row = {k: result[k] for k in ("name", "labels", "protocol", "seconds", "test_images")}
    row |= {"init": read_json(folder / "config.json")["config"]["encoder"]["init"], "draws": 1}
    row |= {"top1_mean": result["top1"], "top1_std": result.get("top1_std"), "pretrain_seeds": 1}
    if sum((r["name"], r["labels"]) == (row["name"], row["labels"]) for r in others.values()) > 1:
        row["name"] += f" {folder}"
    return row


def _command(folder: Path) -> str:
    """What was typed, as far as config.json tells."""
    script, *words = read_json(folder / "config.json")["command"]
    path = Path(script)
    start = f"-m variants.{path.stem}" if path.parent.name == "variants" else path.name
    return f"python {start} {shlex.join(words)}"


class Features:
    """A pretraining run on its own data: test features, a linear classifier on train features."""

    def __init__(self, run: Path, labels: int, evaluate_on: str = "test", draw: int = 0) -> None:
        weights = read_weights(run)
        shared, recipe = tables_of(weights)
        own = dict(labels=labels, evaluate_on=evaluate_on, draw=draw)
        config = datasets.DataConfig(**shared["data"], **own)
        split = evaluation(datasets.load(config), config)
        frozen = load_frozen(run, "auto")
        self.names, self.train, self.test = split.test.class_names, split.train, split.test
        self.known, self.features = frozen(split.train.images), frozen(split.test.images)
        strength = recipe.get("linear", {}).get("strength", 0.0)
        known = torch.from_numpy(split.train.labels)
        self.classifier = fit_linear(self.known, known, len(self.names), strength)
        self.probability = torch.softmax(self.classifier(self.features).double(), 1)
        self.guess, self.truth = self.probability.argmax(1).numpy(), split.test.labels
        top1 = 100 * (self.guess == self.truth).mean()
        self.text = f"{run}: linear classifier on frozen features, {len(split.train):,} labels, "
        self.text += f"draw {draw}: {top1:.2f} % of {len(self.test):,} {evaluate_on} images."

    def confusion(self) -> str:
        """Who is taken for whom."""
        text = f"{self.text} Percent of each true class; below 0.5 left empty."
        return picture(confusion_figure, text, self.truth, self.guess, self.names)

    def neighbours(self) -> str:
        """Test images and the labelled train images nearest to them."""
        count = min(QUERIES, len(self.test))
        chosen = np.random.default_rng(0).choice(len(self.test), count, replace=False)
        near = normalize(self.features[chosen], dim=1) @ normalize(self.known, dim=1).T
        nearest = near.topk(min(NEIGHBOURS, len(self.known)), dim=1).indices.numpy()
        found = ["<p>Left a random image that was measured on, then the labelled train images "
                 "nearest to it by cosine: ✓ of its class, ✗ of another.</p>"]  # fmt: skip
        for query, rows in zip(chosen, nearest, strict=True):
            own = self.truth[query]
            tiles = [tile(self.test.images, query, self.names[own], "query")]
            for row in rows:
                label = self.train.labels[row]
                kind = "right" if label == own else "wrong"
                tiles.append(tile(self.train.images, row, self.names[label], kind))
            found.append(f"<div class='tiles'>{''.join(tiles)}</div>")
        return "".join(found)

    def map(self) -> str:
        """Features of test images in two dimensions."""
        rows = np.linspace(0, len(self.test) - 1, min(MAPPED, len(self.test))).astype(int)
        if len(rows) < 5:
            return "<p>Too few images.</p>"
        x = normalize(self.features[rows], dim=1)
        try:
            from sklearn.manifold import TSNE  # an optional extra

            how, near = "t-SNE", min(30.0, (len(x) - 1) / 3)
            points = TSNE(init="pca", perplexity=near, random_state=0).fit_transform(x.numpy())
        except ImportError:
            how, x = "PCA", x - x.mean(0)
            points = (x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T).numpy()
        text = f"{how} of the normalised features of {len(rows):,} images, a colour a class."
        return picture(map_figure, text, points, self.truth[rows], self.names)

    def mistakes(self) -> str:
        """The wrong predictions with the highest probability."""
        wrong = np.flatnonzero(self.guess != self.truth)
        order = np.argsort(-self.probability.max(1).values.numpy()[wrong], kind="stable")
        tiles = []
        for row in wrong[order][:MISTAKES]:
            guess, truth = self.names[self.guess[row]], self.names[self.truth[row]]
            text = f"{guess} {100 * self.probability[row].max():.0f} %, is {truth}"
            tiles.append(tile(self.test.images, row, text, "wrong"))
        head = "<p>Predicted, how surely, and what it is.</p>"
        return f"{head}<div class='tiles'>{''.join(tiles)}</div>"


MARKS = {"query": "", "right": "✓ ", "wrong": "✗ "}  # colour alone does not tell everyone


def tile(images, row: int, text: str, kind: str) -> str:
    """One image, at most TILE pixels wide, with a line below it."""
    pixels = images.gather(np.array([row]))[0].permute(1, 2, 0).contiguous().numpy()
    image, text = Image.fromarray(pixels), html.escape(MARKS[kind] + text)
    image.thumbnail((TILE, TILE))
    return f"<figure class='{kind}'><img src='{_uri(image.save)}' alt='{text}'>{text}</figure>"


def picture(draw, text: str, *arguments) -> str:
    """A matplotlib figure, drawn once for each theme, with a line below it."""
    found = []
    for dark in (False, True):
        with own_style(dark):
            figure = draw.__wrapped__(*arguments)  # `draw` itself sets the light style
            found.append(_uri(functools.partial(figure.savefig, dpi=110, transparent=True)))
    text = html.escape(text)
    return (
        f"<figure style='margin:0'><picture class=wide><source srcset='{found[1]}' "
        f"media='(prefers-color-scheme: dark)'><img src='{found[0]}' alt='{text}'></picture>"
        f"<figcaption>{text}</figcaption></figure>"
    )


def _uri(save) -> str:
    """A PNG as a data URI; `save` writes it to a file."""
    file = io.BytesIO()
    save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def to_html(text: str) -> str:
    """The Markdown that eval/table.py writes: headings, tables, lists, paragraphs, code."""
    text = re.sub("`(.+?)`", r"<code>\1</code>", html.escape(text))
    found = []
    for mark, group in itertools.groupby(text.splitlines(), key=lambda line: line[:1]):
        lines = list(group)
        if mark == "|":
            rows = [line.strip("|").split("|") for line in lines if not line.startswith("|---")]
            cells = ["".join(f"<td>{cell.strip()}</td>" for cell in row) for row in rows]
            body = "".join(f"<tr>{row}</tr>" for row in cells)
            found.append(f"<div class=wide><table>{body.replace('td>', 'th>', 2 * len(rows[0]))}")
            found.append("</table></div>")
        elif mark == "-":
            found.append(f"<ul>{''.join(f'<li>{line[2:]}</li>' for line in lines)}</ul>")
        elif mark == "#":
            found += [f"<h3>{line.lstrip('# ')}</h3>" for line in lines]
        else:
            found += [f"<p>{line}</p>" for line in lines if line]
    return "".join(found)


def run_facts(folder: Path) -> str:
    """What a pretraining run was: its result, and its settings behind a fold."""
    result, config = read_json(folder / "result.json"), read_json(folder / "config.json")
    facts = f"{folder}: {result['name']} on {result['dataset']}, {result['steps']:,} steps, "
    facts += f"{result['seconds']:,.0f} s, commit {config['commit']}: {_command(folder)}"
    facts += "".join(f"; warning: {text}" for text in result["warnings"])
    settings = {k: v for k, v in config["config"].items() if k != "recipe"}
    return (
        f"<p>{html.escape(facts)}</p><details><summary>settings</summary>"
        f"<pre>{html.escape(json.dumps(settings, indent=1))}</pre></details>"
    )


def build(folders: list[Path]) -> str:
    """The whole page."""
    found, parts = find(folders), []
    if found.rows:
        parts.append(("Results", "".join(map(to_html, found.tables))))
        text = "Top-1 against labels; bars are standard deviations over label draws."
        parts.append(("Accuracy against labels", picture(accuracy_figure, text, found.rows)))
    if found.pretraining:
        metrics = {str(f): read_metrics(f / "metrics.jsonl") for f in found.pretraining}
        curves = picture(curves_figure, "A colour a run; k-NN on held-out train images.", metrics)
        parts.append(("Pretraining", "".join(map(run_facts, found.pretraining)) + curves))
    try:
        if not found.pretraining:
            raise UserError("no run of pretraining was named")
        most = max((r["labels"] for r in found.rows), default=0)
        features = Features(found.pretraining[0], most, **found.measured)
        parts.append(("Confusion and classes", features.confusion()))
        parts.append(("Nearest neighbours", features.neighbours()))
        parts.append(("Map of the features", features.map()))
        parts.append(("Most confident mistakes", features.mistakes()))
    except (UserError, OSError, TypeError) as error:  # data that are gone, a config of other code
        parts.append(("Features", f"<p>Left out: {html.escape(str(error))}</p>"))
    title = html.escape(", ".join(f.resolve().name for f in folders))
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in parts)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f"content='width=device-width,initial-scale=1'><title>{title}</title>"
        f"<style>{STYLE}</style><h1>{title}</h1>{body}</html>\n"
    )


def main(argv: list[str] | None = None) -> Path:
    """Run from the command line; returns where the page is."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", help="file to write [RUN/report.html]")
    with one_line_errors():
        given = parser.parse_args(argv)
        out = new_file(given.out) if given.out else given.runs[0] / "report.html"
        page = build(given.runs).encode(errors="backslashreplace")
        write_atomically(out, page)
        print(f"{out}: {len(page) / 1e6:.1f} MB, opens in any browser")
    return out


if __name__ == "__main__":
    main()
