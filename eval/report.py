"""One self-contained report.html of runs: table, curves, mistakes, neighbors, a map of features.

python -m eval.report runs/sample                         # a folder of reproduce.py
python -m eval.report runs/byol-mine runs/baseline-mine   # runs of the scripts, with evaluations

Confusion, neighbors, map and mistakes are the first pretraining run's, and need its data.
Written into the first folder, anew each time, unless --out names another file.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader
from markdown import Markdown
from markdown.util import Registry
from markupsafe import Markup
from PIL import Image
from torch.nn.functional import normalize

from core.device import pick_device
from core.errors import UserError, one_line_errors
from core.files import new_file, read_json, write_atomically
from core.options import Parser
from data import datasets
from data.labelled import evaluation
from eval.classifiers import fit_linear
from eval.pictures import accuracy_figure, confusion_figure, curves_figure, map_figure, save
from eval.table import Cells
from eval.trained import FrozenEncoder, from_weights, inherited_tables
from training.distributed import Processes
from training.run_folder import read_metrics
from training.weights import read_weights

QUERIES, NEIGHBORS, MISTAKES, MAPPED, TILE = 8, 6, 24, 1000, 144
MARKS = {"query": "", "right": "✓ ", "wrong": "✗ "}  # color alone does not tell everyone


def results_in(folder: Path) -> dict[Path, dict]:
    """result.json of the finished runs: `folder`, and the folders in it unless it is an evaluation.

    The folders in an evaluation are parts of it: folds or trials.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run, or a folder of reproduce.py")
    paths = [folder / "result.json", *sorted(folder.glob("*/result.json"))]
    results = {path.parent: read_json(path) for path in paths if path.exists()}
    if "top1" in results.get(folder, {}):
        return {folder: results[folder]}
    return results


def labelled_images(table: Path) -> dict:
    """Labels, draw and test images of a table of reproduce.py, as arguments of `Features`."""
    settings = read_json(table / "settings.json")
    on = settings["recipe"].get("data", {}).get("evaluate_on", "test")
    on = settings["flags"].get("data.evaluate_on", on)
    cells = Cells(table / "cells.jsonl", False).cells.values()
    most = max((cell["labels"] for cell in cells), default=0)
    first = min((cell["draw"] for cell in cells), default=0)
    return {"labels": most, "evaluate_on": on, "draw": first}


class Features:
    """A pretraining run on its data: features, and a linear classifier on those of train images.

    known, features      of the labelled train images and of the test images
    guess, probability   predicted class of each test image, and the probability of each class
    """

    def __init__(self, run: Path, labels: int, evaluate_on: str = "test", draw: int = 0) -> None:
        weights, device = read_weights(run), torch.device(pick_device("auto"))
        shared, recipe = inherited_tables(weights)
        chosen = dict(labels=labels, evaluate_on=evaluate_on, draw=draw)
        config = datasets.LabelledData(**shared["data"], **chosen)
        split = evaluation(datasets.load(config), config)
        frozen = FrozenEncoder(*from_weights(weights, str(run), "cpu"), Processes(0, 1, device))
        self.train, self.test, self.names = split.train, split.test, split.test.class_names
        self.known, self.features = frozen(self.train.images), frozen(self.test.images)
        strength = recipe.get("linear", {}).get("strength", 0.0)
        targets = torch.from_numpy(self.train.labels)
        classifier = fit_linear(self.known, targets, len(self.names), strength)
        self.probability = torch.softmax(classifier(self.features).double(), 1).numpy()
        self.guess, self.truth = self.probability.argmax(1), self.test.labels
        top1 = 100 * (self.guess == self.truth).mean()
        self.text = (
            f"{run}: linear classifier on frozen features, {len(self.train):,} labels, "
            f"draw {draw}: {top1:.2f} % of {len(self.test):,} {evaluate_on} images. Percent of "
            "each true class, if at least 0.5; of more than 25 classes the least accurate."
        )

    def confusion(self) -> dict:
        """The confusion matrix."""
        return picture(confusion_figure, self.text, self.truth, self.guess, self.names)

    def neighbors(self) -> list[list[dict]]:
        """Test images, each followed by the labelled train images nearest to it."""
        count = min(QUERIES, len(self.test))
        queries = np.random.default_rng(0).choice(len(self.test), count, replace=False)
        cosine = normalize(self.features[queries], dim=1) @ normalize(self.known, dim=1).T
        nearest = cosine.topk(min(NEIGHBORS, len(self.known)), dim=1).indices.numpy()
        rows = []
        for query, neighbors in zip(queries, nearest, strict=True):
            truth = self.truth[query]
            tiles = [tile(self.test.images, query, self.names[truth], "query")]
            for i in neighbors:
                label = self.train.labels[i]
                kind = "right" if label == truth else "wrong"
                tiles.append(tile(self.train.images, i, self.names[label], kind))
            rows.append(tiles)
        return rows

    def map(self) -> dict:
        """Features of test images in two dimensions."""
        rows = np.linspace(0, len(self.test) - 1, min(MAPPED, len(self.test))).astype(int)
        x = normalize(self.features[rows], dim=1)
        x = x - x.mean(0)
        directions = torch.linalg.eigh(x.T @ x).eigenvectors[:, -2:]  # of the largest variance
        text = f"PCA of the normalized features of {len(rows):,} images, a color a class."
        return picture(map_figure, text, (x @ directions).numpy(), self.truth[rows], self.names)

    def mistakes(self) -> list[dict]:
        """The wrong predictions with the highest probability."""
        sure, tiles = self.probability.max(1), []
        order = np.argsort(-sure, kind="stable")
        for row in order[self.guess[order] != self.truth[order]][:MISTAKES]:
            guess, truth = self.names[self.guess[row]], self.names[self.truth[row]]
            text = f"{guess} {100 * sure[row]:.0f} %, is {truth}"
            tiles.append(tile(self.test.images, row, text, "wrong"))
        return tiles


def tile(images, row: int, text: str, kind: str) -> dict:
    """One image, at most TILE pixels wide, with a line below it."""
    image = Image.fromarray(images.take(np.array([row]))[0].permute(1, 2, 0).numpy())
    image.thumbnail((TILE, TILE))
    file = io.BytesIO()
    image.save(file, "png")
    return {"kind": kind, "image": data_uri(file), "text": MARKS[kind] + text}


def picture(draw, text: str, *arguments) -> dict:
    """The figure that `draw` makes of `arguments`, with a line below it."""
    file = io.BytesIO()
    save(file, draw, *arguments)
    return {"image": data_uri(file), "text": text}


def data_uri(png: io.BytesIO) -> str:
    """The address of a picture that is part of the page."""
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def to_html(text: str) -> Markup:
    """Headings, tables, lists and code of results.md as HTML; all other markup stays text."""
    converter = Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")
    inline = converter.treeprocessors["inline"]
    code = inline.inlinePatterns["backtick"]
    inline.inlinePatterns = Registry()
    inline.inlinePatterns.register(code, "backtick", 0)
    return Markup(converter.convert(text))


def build(folders: list[Path]) -> str:
    """The whole page; UserError where no folder holds a finished run."""
    results, tables, rows, labelled, parts = {}, [], [], {"labels": 0}, {}
    for folder in folders:
        results |= results_in(folder)
        if (folder / "results.json").exists():
            tables.append((folder / "results.md").read_text("utf-8", "replace"))
            rows += json.loads((folder / "results.json").read_bytes())
            labelled = labelled_images(folder)
    if not (results or tables):
        raise UserError(f"{' '.join(map(str, folders))}: no finished run there")
    if tables:
        text = "Top-1; bars are standard deviations over label draws."
        parts |= {"tables": tables, "accuracy": picture(accuracy_figure, text, rows)}
    runs = {folder: result for folder, result in results.items() if "top1" not in result}
    evaluations = {folder: result for folder, result in results.items() if "top1" in result}
    if evaluations:
        most = max(evaluations.values(), key=lambda result: result["labels"])
        labelled = {k: most[k] for k in ("labels", "draw")} | {"evaluate_on": most["measured_on"]}
    if runs:
        metrics = {str(folder): read_metrics(folder / "metrics.jsonl") for folder in runs}
        text = "A color a run; k-NN on held-out train images."
        configs = {folder: read_json(folder / "config.json") for folder in runs}
        curves = picture(curves_figure, text, metrics)
        parts |= {"runs": runs, "configs": configs, "curves": curves}
        try:
            parts["features"] = Features(next(iter(runs)), **labelled)
        except (UserError, OSError) as error:  # the data may be gone
            parts["missing"] = str(error)
    title = ", ".join(folder.resolve().name for folder in folders)
    files = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=files, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["markdown"] = to_html
    page = environment.get_template("report.html")
    return page.render(title=title, evaluations=evaluations, **parts)


def main(argv: list[str] | None = None) -> Path:
    """Run from the command line; returns where the page is."""
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", help="file to write [RUN/report.html]")
    with one_line_errors():
        args = parser.parse_args(argv)
        out = new_file(args.out) if args.out else args.runs[0] / "report.html"
        page = build(args.runs).encode(errors="backslashreplace")
        write_atomically(out, page)
        print(f"{out}: {len(page) / 1e6:.1f} MB, opens in any browser")
    return out


if __name__ == "__main__":
    main()
