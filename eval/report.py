"""Write one self-contained report.html: results, curves, mistakes, neighbors, feature map.

python -m eval.report runs/sample                         # a folder of reproduce.py
python -m eval.report runs/byol-mine runs/baseline-mine   # runs of the scripts, with evaluations

Confusion matrix, neighbors, map and mistakes are of the first pretraining run, and left out where
its data is missing.  Without --out, the report replaces that of the first folder.
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
# beside the frames' colors, for readers who can't tell these apart
MARKS = {"query": "", "right": "✓ ", "wrong": "✗ "}


def results_in(folder: Path) -> dict[Path, dict]:
    """{run folder: result.json} of the finished runs: `folder` itself and the folders in it.

    If `folder` is an evaluation, that one alone, since the folders in it are its folds or trials.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run, or a folder of reproduce.py")
    paths = [folder / "result.json", *sorted(folder.glob("*/result.json"))]
    results = {path.parent: read_json(path) for path in paths if path.exists()}
    if "top1" in results.get(folder, {}):
        return {folder: results[folder]}
    return results


def labelled_images(table: Path) -> dict:
    """Arguments of `Features` for a table of reproduce.py: the largest budget, its first draw."""
    settings = read_json(table / "settings.json")
    on = settings["recipe"].get("data", {}).get("evaluate_on", "test")
    on = settings["flags"].get("data.evaluate_on", on)
    cells = Cells(table / "cells.jsonl", False).cells.values()
    most = max((cell["labels"] for cell in cells), default=0)
    first = min((cell["draw"] for cell in cells), default=0)
    return {"labels": most, "evaluate_on": on, "draw": first}


class Features:
    """Sections of the report: a pretraining run's features, and a linear classifier on them.

    known, features      features (N, D) of the labelled train images, and of the test images
    guess, probability   predicted class of each test image (N,), and probabilities (N, classes)
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
            "each true class, from 0.5 on; the 25 classes of lowest accuracy if there are more."
        )

    def confusion(self) -> dict:
        """Figure of the confusion matrix."""
        return picture(confusion_figure, self.text, self.truth, self.guess, self.names)

    def neighbors(self) -> list[list[dict]]:
        """Rows of tiles: a random test image, then the labelled train images nearest to it."""
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
        """Figure of the test images' features in two dimensions."""
        rows = np.linspace(0, len(self.test) - 1, min(MAPPED, len(self.test))).astype(int)
        x = normalize(self.features[rows], dim=1)
        x = x - x.mean(0)
        directions = torch.linalg.eigh(x.T @ x).eigenvectors[:, -2:]  # of the largest variance
        text = f"PCA of the normalized features of {len(rows):,} images, one color per class."
        return picture(map_figure, text, (x @ directions).numpy(), self.truth[rows], self.names)

    def mistakes(self) -> list[dict]:
        """Tiles of the wrong predictions with the highest probability."""
        sure, tiles = self.probability.max(1), []
        order = np.argsort(-sure, kind="stable")
        for row in order[self.guess[order] != self.truth[order]][:MISTAKES]:
            guess, truth = self.names[self.guess[row]], self.names[self.truth[row]]
            text = f"{guess} {100 * sure[row]:.0f} %, is {truth}"
            tiles.append(tile(self.test.images, row, text, "wrong"))
        return tiles


def tile(images, row: int, text: str, kind: str) -> dict:
    """Template entry for an image, at most TILE pixels wide, with a line of text."""
    image = Image.fromarray(images.take(np.array([row]))[0].permute(1, 2, 0).numpy())
    image.thumbnail((TILE, TILE))
    file = io.BytesIO()
    image.save(file, "png")
    return {"kind": kind, "image": data_uri(file), "text": MARKS[kind] + text}


def picture(draw, text: str, *arguments) -> dict:
    """Template entry for the figure `draw(*arguments)`, with a line of text."""
    file = io.BytesIO()
    save(file, draw, *arguments)
    return {"image": data_uri(file), "text": text}


def data_uri(png: io.BytesIO) -> str:
    """The PNG as a data URI, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def to_html(text: str) -> Markup:
    """results.md as HTML: headings, tables, lists and code; all other markup stays text."""
    converter = Markdown(extensions=["tables"])
    converter.preprocessors.deregister("html_block")
    inline = converter.treeprocessors["inline"]
    code = inline.inlinePatterns["backtick"]
    inline.inlinePatterns = Registry()
    inline.inlinePatterns.register(code, "backtick", 0)
    return Markup(converter.convert(text))


def build(folders: list[Path]) -> str:
    """The page as HTML; UserError where no folder holds a finished run."""
    results, tables, rows, labelled, parts = {}, [], [], {"labels": 0}, {}
    for folder in folders:
        results |= results_in(folder)
        if (folder / "results.json").exists():
            tables.append((folder / "results.md").read_text("utf-8", "replace"))
            rows += json.loads((folder / "results.json").read_bytes())
        if (folder / "settings.json").exists():
            labelled = labelled_images(folder)
    if not (results or tables):
        raise UserError(f"{' '.join(map(str, folders))}: no finished run in there")
    if tables:
        text = "Top-1; error bars: standard deviation over label draws."
        parts |= {"tables": tables, "accuracy": picture(accuracy_figure, text, rows)}
    runs = {folder: result for folder, result in results.items() if "top1" not in result}
    evaluations = {folder: result for folder, result in results.items() if "top1" in result}
    sets = [run["dataset"] for run in (*runs.values(), *evaluations.values())]
    if of_set := [result for result in evaluations.values() if result["dataset"] == sets[0]]:
        most = max(of_set, key=lambda result: result["labels"])
        labelled = {k: most[k] for k in ("labels", "draw")} | {"evaluate_on": most["measured_on"]}
    if runs:
        metrics = {str(folder): read_metrics(folder / "metrics.jsonl") for folder in runs}
        text = "One color per run; k-NN on held-out train images."
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
    """Run from the command line; returns the path of the page."""
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
