"""Pictures: any name can be drawn, and the user's settings don't matter."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from eval import pictures, report
from eval.pictures import save
from eval.table import Cells

ROOT = Path(report.__file__).parents[1]

NASTY = [
    "\udcff\udcfe", "$", r"$\foo$", "_x^2", "a|b`c`\\", "<script>&\"'", "line\nbreak\ttab",
    "\u202eright \x01", "😀日本語", "\u0627\u0905", "n" * 250, "%s {}",
]  # fmt: skip
HOSTILE = {
    "text.usetex": True,
    "savefig.format": "pdf",
    "savefig.bbox": "tight",
    "figure.dpi": 40,
    "font.size": 20,
    "axes.prop_cycle": matplotlib.cycler(color=["#123456"]),
    "axes.facecolor": "red",
    "axes.spines.left": False,
    "xtick.color": "red",
    "image.cmap": "hot",
    "legend.loc": "upper left",
}


def figures(names: list[str]):
    """Arguments of each picture function, by its name."""
    rng, count = np.random.default_rng(0), len(names)
    truth, guess = rng.integers(0, count, (2, 300))
    rows = [
        dict(name=name, init="none", labels=labels, top1_mean=50.0 + i, top1_std=1.0)
        for i, name in enumerate(names)
        for labels in (20, 100)
    ]
    budget = [
        dict(name=name, kind=kind, labels=20, top1=50.0 + i, std=None)
        for i, name in enumerate(names)
        for kind in ("linear", "knn")
    ]
    budget += [dict(name=f"{name} control", kind="linear", labels=20, top1=40.0, std=None)
               for name in names]  # fmt: skip
    steps = [dict(step=s, loss=4.0 - s, lr=s * 1e-5) for s in range(3)]
    return {
        "accuracy_figure": (rows, names[0]),
        "curves_figure": ({name: steps for name in names},),
        "dots_figure": (budget,),
        "confusion_figure": (truth, guess, names),
        "map_figure": (rng.normal(size=(300, 2)), truth, names),
    }


KINDS = list(figures(["a"]))


@pytest.mark.parametrize("kind", KINDS)
def test_any_name_can_be_drawn(tmp_path, kind):
    path = tmp_path / "\udcff $x" / "picture.svg"
    path.parent.mkdir()
    draw, arguments = getattr(pictures, kind), figures(NASTY)[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(path, draw, *arguments)
        figure = draw(*arguments)
    picture = Image.open(path)
    picture.load()
    assert picture.format == "PNG" and picture.info["Software"] == "byol"
    legends = figure.legends + [axes.get_legend() for axes in figure.axes]
    if kind in ("curves_figure", "map_figure"):
        texts = [text.get_text() for text in legends[0].texts]
        assert len(texts) == len(NASTY) and [t.strip() for t in texts[:4]] == [
            r"\udcff\udcfe", "$", r"$\foo$", "_x^2",
        ]  # fmt: skip


@pytest.mark.parametrize("second, names", [
    ("random", ["raw", "byol"]), ("imagenet", ["raw", "byol (imagenet)", "byol (random)"]),
])  # fmt: skip
def test_initial_weights_are_named_where_there_are_several(second, names):
    kinds = [("raw", "none"), ("byol", "random"), ("byol", second)]
    rows = [
        dict(name=name, init=init, labels=20 * (1 + i // 2), top1_mean=50.0, top1_std=1.0)
        for i, (name, init) in enumerate(kinds)
    ]
    labels = pictures.accuracy_figure(rows).axes[0].get_yticklabels()
    assert sorted({label.get_text() for label in labels}) == sorted(names)


def test_a_run_without_metrics_has_an_empty_picture(tmp_path):
    save(tmp_path / "curves.png", pictures.curves_figure, {"a": []})
    assert Image.open(tmp_path / "curves.png").size[1] > 100


def test_classes_without_a_test_image_are_not_the_worst():
    names = [f"c{n}" for n in range(60)]
    truth = np.repeat(np.arange(30, 60), 3)
    figure = pictures.confusion_figure(truth, np.where(truth == 59, 0, truth), names)
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(shown) == 25 and "c59" in shown and min(int(name[1:]) for name in shown) >= 30


@pytest.mark.parametrize("kind", KINDS)
def test_long_names_leave_room_for_the_axes(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as where the axes collapse
        save(io.BytesIO(), getattr(pictures, kind), *figures(["n" * 250, "v" * 250])[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_settings_change_no_pixel_and_stay(kind):
    draw, arguments = getattr(pictures, kind), figures(["a", "b", "c"])[kind]

    def drawn():
        file = io.BytesIO()
        save(file, draw, *arguments)
        return file.getvalue()

    usual = drawn()
    with matplotlib.rc_context(HOSTILE):
        before = dict(matplotlib.rcParams)
        assert drawn() == usual
        assert dict(matplotlib.rcParams) == before


PROGRAM = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

import reproduce
from eval import report
from core.errors import UserError
from training.distributed import SINGLE

def gone(config):
    raise UserError("gone")

report.datasets.load = gone
recipe, out = sys.argv[1:]
config = reproduce.configure(["--recipe", recipe])
rows = json.loads(Path(out, "rows.json").read_bytes())
cells = SimpleNamespace(rows=lambda: rows, claims=lambda method: [])
table = SimpleNamespace(config=config, out=Path(out), processes=SINGLE, cells=cells)
reproduce.write_results(table, {"byol": [Path(out, "_run $x")]})
report.main([out])
"""


def test_no_setting_of_matplotlib_ends_the_scripts(trained_run, tmp_path, monkeypatch):
    out = tmp_path / "a|\udcff`$ <b>\n| table"
    shutil.copytree(trained_run, out / "_run $x")
    rows = figures(["byol-linear", "raw-pixels"])["accuracy_figure"][0]
    rows = [row | dict(draws=1, pretrain_seeds=1, seconds=1.0, protocol="features-linear",
                       test_images=100) for row in rows]  # fmt: skip
    (out / "rows.json").write_text(json.dumps(rows))
    (out / "settings.json").write_text(json.dumps({"recipe": {}, "flags": {}}))
    Cells(out / "cells.jsonl", True).add(("byol-linear", "none", 20, 0, 0), top1=50.0)
    settings = "backend: tkagg\ntext.usetex: True\nsavefig.format: pdf\nfigure.dpi: 40\n"
    settings += "axes.prop_cycle: cycler('color', ['k'])\naxes.facecolor: red\nfont.size: 20\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    environment = os.environ | {"MPLBACKEND": "nonsense", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", PROGRAM, str(trained_run.parent / "tiny.toml"), str(out)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Warning" not in done.stderr
    page = (out / "report.html").read_text("utf-8")

    def gone(config):
        raise UserError("gone")

    monkeypatch.setattr(report.datasets, "load", gone)
    assert report.main([str(out), "--out", str(tmp_path / "page.html")]).read_text("utf-8") == page
    save(tmp_path / "results.png", pictures.accuracy_figure, rows, "Results")
    assert (tmp_path / "results.png").read_bytes() == (out / "results.png").read_bytes()
