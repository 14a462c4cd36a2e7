"""One self-contained report.html of runs: table, curves, mistakes, neighbours, a map of features.

python -m eval.report runs/sample                         # a folder of reproduce.py
python -m eval.report runs/byol-mine runs/baseline-mine   # runs of the scripts, with evaluations

Confusion, neighbours, map and mistakes are the first pretraining run's, and need its data.
Written into the first folder, anew each time, unless --out names another file.
"""

import argparse
import base64
import functools
import io
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment
from markdown import Markdown
from markupsafe import Markup
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
from eval.trained import frozen_of, tables_of
from training.run_folder import read_metrics
from training.weights import read_weights

QUERIES, NEIGHBOURS, MISTAKES, MAPPED, TILE = 8, 6, 24, 1000, 144
MARKS = {"query": "", "right": "✓ ", "wrong": "✗ "}  # color alone does not tell everyone


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
        config = datasets.LabelledData(**shared["data"], **own)
        split = evaluation(datasets.load(config), config)
        frozen = frozen_of(weights, str(run), "auto")
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

    def confusion(self) -> dict:
        """The confusion matrix."""
        text = f"{self.text} Percent of each true class; below 0.5 left empty."
        return picture(confusion_figure, text, self.truth, self.guess, self.names)

    def neighbours(self) -> list[list[dict]]:
        """Test images, each followed by the labelled train images nearest to it."""
        count = min(QUERIES, len(self.test))
        chosen = np.random.default_rng(0).choice(len(self.test), count, replace=False)
        near = normalize(self.features[chosen], dim=1) @ normalize(self.known, dim=1).T
        nearest = near.topk(min(NEIGHBOURS, len(self.known)), dim=1).indices.numpy()
        rows = []
        for query, index in zip(chosen, nearest, strict=True):
            label, labels = self.truth[query], self.train.labels
            tiles = [tile(self.test.images, query, self.names[label], "query")]
            for i in index:
                kind = "right" if labels[i] == label else "wrong"
                tiles.append(tile(self.train.images, i, self.names[labels[i]], kind))
            rows.append(tiles)
        return rows

    def map(self) -> dict | None:
        """Features of test images in two dimensions; None for too few images."""
        rows = np.linspace(0, len(self.test) - 1, min(MAPPED, len(self.test))).astype(int)
        if len(rows) < 5:
            return None
        x = normalize(self.features[rows], dim=1)
        try:
            from sklearn.manifold import TSNE  # an optional extra

            how, near = "t-SNE", min(30.0, (len(x) - 1) / 3)
            points = TSNE(init="pca", perplexity=near, random_state=0).fit_transform(x.numpy())
        except ImportError:
            how, x = "PCA", x - x.mean(0)
            points = (x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T).numpy()
        text = f"{how} of the normalized features of {len(rows):,} images, a color a class."
        return picture(map_figure, text, points, self.truth[rows], self.names)

    def mistakes(self) -> list[dict]:
        """The wrong predictions with the highest probability."""
        wrong = np.flatnonzero(self.guess != self.truth)
        order = np.argsort(-self.probability.max(1).values.numpy()[wrong], kind="stable")
        tiles = []
        for row in wrong[order][:MISTAKES]:
            guess, truth = self.names[self.guess[row]], self.names[self.truth[row]]
            text = f"{guess} {100 * self.probability[row].max():.0f} %, is {truth}"
            tiles.append(tile(self.test.images, row, text, "wrong"))
        return tiles


def tile(images, row: int, text: str, kind: str) -> dict:
    """One image, at most TILE pixels wide, with a line below it."""
    pixels = images.gather(np.array([row]))[0].permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((TILE, TILE))
    return {"kind": kind, "image": _uri(image.save), "text": MARKS[kind] + text}


def picture(draw, text: str, *arguments) -> dict:
    """A matplotlib figure, drawn once for each theme, with a line below it."""
    themes = {"text": text}
    for name, dark in (("light", False), ("dark", True)):
        with own_style(dark):
            figure = draw.__wrapped__(*arguments)  # `draw` itself sets the light style
            themes[name] = _uri(functools.partial(figure.savefig, dpi=110, transparent=True))
    return themes


def _uri(save) -> str:
    """A PNG as a data URI; `save` writes it to a file."""
    file = io.BytesIO()
    save(file, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def to_html(text: str) -> Markup:
    """The Markdown of results.md; all that could be more than tables and code is shown as text."""
    converter = Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")
    converter.preprocessors.deregister("reference", strict=False)
    for name in [pattern.name for pattern in converter.inlinePatterns._priority]:
        if name != "backtick":
            converter.inlinePatterns.deregister(name)
    return Markup(converter.convert(text))


def run_facts(folder: Path) -> dict:
    """What a pretraining run was: its result, and its settings."""
    result, config = read_json(folder / "result.json"), read_json(folder / "config.json")
    text = f"{folder}: {result['name']} on {result['dataset']}, {result['steps']:,} steps, "
    text += f"{result['seconds']:,.0f} s, commit {config['commit']}: {_command(folder)}"
    text += "".join(f"; warning: {warning}" for warning in result["warnings"])
    settings = {k: v for k, v in config["config"].items() if k != "recipe"}
    return {"text": text, "settings": json.dumps(settings, indent=1)}


def build(folders: list[Path]) -> str:
    """The whole page."""
    found, parts = find(folders), {}
    if found.rows:
        parts["tables"] = found.tables
        text = "Top-1 against labels; bars are standard deviations over label draws."
        parts["accuracy"] = picture(accuracy_figure, text, found.rows)
    if found.pretraining:
        metrics = {str(f): read_metrics(f / "metrics.jsonl") for f in found.pretraining}
        text = "A color a run; k-NN on held-out train images."
        parts["curves"] = picture(curves_figure, text, metrics)
        parts["runs"] = map(run_facts, found.pretraining)
    try:
        if not found.pretraining:
            raise UserError("no run of pretraining was named")
        most = max((r["labels"] for r in found.rows), default=0)
        features = Features(found.pretraining[0], most, **found.measured)
        for name in ("confusion", "neighbours", "map", "mistakes"):
            parts[name] = getattr(features, name)()
    except (UserError, OSError, TypeError) as error:  # data that are gone, a config of other code
        parts["missing"] = str(error)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["markdown"] = to_html
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    title = ", ".join(f.resolve().name for f in folders)
    return environment.from_string(template).render(title=title, **parts).lstrip()


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
