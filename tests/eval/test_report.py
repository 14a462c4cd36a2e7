"""The report: one file with all sections, and the numbers of results.md."""

import base64
import dataclasses
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import data.sample
from eval import report
from eval.pictures import confusion_figure, map_figure
from eval.table import Cells, markdown

SECTIONS = [
    "Results",
    "Accuracy",
    "Pretraining",
    "Confusion and classes",
    "Nearest neighbors",
    "Map of the features",
    "Most confident mistakes",
]


class Page(HTMLParser):
    """Tags with their attributes, and the text of headings and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags = []
        self.text = {tag: [] for tag in ("h2", "th", "td", "code", "figure")}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in self.text:
            self.open.append(tag)
            self.text[tag].append("")

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]][-1] += data


@pytest.fixture
def table(trained_run, tmp_path):
    """A folder as reproduce.py writes it."""
    folder = tmp_path / "a <table>"
    shutil.copytree(trained_run, folder / "byol-random-seed0")
    cells = Cells(folder / "cells.jsonl", True)
    for name, init, top1 in (("byol-linear", "random", 61.0), ("raw-pixels", "none", 50.0)):
        for labels, draw in itertools.product((20, 100), (3, 4)):
            cells.add((name, init, labels, draw, 0), top1=top1 + draw / 2, seconds=1.5,
                      protocol="features-linear", test_images=100)  # fmt: skip
    rows, claims = cells.rows(), cells.claims("byol")
    (folder / "results.json").write_text(json.dumps(rows))
    notes = ["`python reproduce.py --out 'a <b>'`"]
    (folder / "results.md").write_text(markdown(rows, claims, "The title", notes))
    (folder / "settings.json").write_text(json.dumps({"recipe": {}, "flags": {}}))
    return folder


def test_it_is_complete_and_needs_nothing_else(sample, table):
    out = report.main([str(table)])
    assert out == table / "report.html"
    text = out.read_text()
    page = Page(text)
    assert page.text["h2"] == SECTIONS
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    sources = [a[k] for _, a in page.tags for k in ("src", "href") if k in a]
    assert len(sources) > 50 and all(s.startswith("data:image/png;base64,") for s in sources)
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).load()
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    assert "a &lt;table&gt;" in text and "width=device-width" in text


def test_the_table_is_that_of_the_text(sample, table):
    page = Page(report.main([str(table)]).read_text())
    cells = page.text["td"]
    for expected in ("62.8 ± 0.4", "51.8 ± 0.4", "2 x 1", "features-linear"):
        assert expected in cells
    assert any(cell.startswith("byol-linear - raw-pixels") for cell in cells)
    assert cells.count("+11.00") == 2
    assert "python reproduce.py --out 'a <b>'" in page.text["code"]
    for line in (table / "results.md").read_text().splitlines():
        if line.startswith("| "):
            for cell in line.strip("|").split("|"):
                assert cell.strip() in [*cells, *page.text["th"]]


def test_a_table_of_validation_images_shows_no_test_image(sample, table):
    settings = {"recipe": {}, "flags": {"data.evaluate_on": "validation"}}
    (table / "settings.json").write_text(json.dumps(settings))
    for name in ("results.json", "cells.jsonl", "results.md"):
        text = (table / name).read_text()
        (table / name).write_text(text.replace('"labels": 100', '"labels": 40'))
    for _ in range(2):  # the second time like a table of several methods
        text = report.main([str(table)]).read_text()
        assert "40 labels, draw 3: " in text and "% of 60 validation images" in text
        (table / "results.json").unlink(missing_ok=True)
    found = report.Features(table / "byol-random-seed0", 40, "validation", 3)
    assert found.test.index is not None and not set(found.test.index) & set(found.train.index)


def pixels_of(source: str) -> np.ndarray:
    """(H, W) of a gray image in a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))[..., 0]


def test_the_pictures_tell_right_from_wrong(sample, subset, trained_run):
    features = report.Features(trained_run, 100)
    measured = json.loads((trained_run / "linear/result.json").read_text())["top1"]
    assert 100 * np.mean(features.guess == features.truth) == pytest.approx(measured)
    assert f"{measured:.2f} % of 100 test images" in features.confusion()["text"]
    rows = features.neighbors()
    assert len(rows) == 8
    for row in rows:
        kinds = [tile["kind"] for tile in row]
        query, *names = [tile["text"] for tile in row]
        first, *others = [pixels_of(tile["image"]) for tile in row]
        own = next(i for i, x in enumerate(subset.test.parts[0]) if (x[0] == first).all())
        assert subset.class_names[subset.test_labels[own]] == query
        cosine = torch.cosine_similarity(features.features[own][None], features.known)
        near = cosine.argsort(descending=True)[:6].tolist()
        for i, pixels in zip(near, others, strict=True):
            assert (subset.train.parts[0][i, 0] == pixels).all()
        labels = [subset.class_names[subset.train_labels[i]] for i in near]
        assert names == [f"{'✓' if name == query else '✗'} {name}" for name in labels]
        assert kinds == ["query", *("right" if name == query else "wrong" for name in labels)]
    mistakes = [tile["text"] for tile in features.mistakes()]
    sure = [float(re.search(r" (\d+) %", text)[1]) for text in mistakes]
    assert sure == sorted(sure, reverse=True) and len(mistakes) == 24
    for text in mistakes:
        guess, truth = re.fullmatch(r"✗ (.*) \d+ %, is (.*)", text).groups()
        assert guess != truth


def test_runs_of_the_scripts_have_a_row_each(sample, trained_run, tmp_path):
    out = report.main([str(trained_run), "--out", str(tmp_path / "r.html")])
    page = Page(out.read_text())
    assert page.text["h2"] == ["Evaluations", *SECTIONS[2:]]
    top1 = json.loads((trained_run / "linear/result.json").read_text())["top1"]
    row = [str(trained_run / "linear"), "byol-linear", "features-linear", "sample", str(top1)]
    first = page.text["td"].index(row[0])
    assert page.text["td"][first : first + 5] == row


def test_an_evaluation_on_another_set_changes_no_picture(sample, trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    before = Page(report.build([tmp_path / "run"]))
    other = json.loads((tmp_path / "run/linear/result.json").read_text())
    other |= {"dataset": "cifar10", "labels": 50000}
    (tmp_path / "run/linear-cifar10").mkdir()
    (tmp_path / "run/linear-cifar10/result.json").write_text(json.dumps(other))
    after = Page(report.build([tmp_path / "run"]))
    assert "cifar10" in after.text["td"] and after.text["h2"] == before.text["h2"]


NASTY = [
    "\udcff\udcfe", r"$\foo$", "_x", "a|b`c`\\", "<script>&\"'", "line\nbreak\ttab", "\u202eright",
    "😀日本語", "n" * 250, "'><img src=x>",
]  # fmt: skip


def test_names_may_hold_any_character(sample, table, monkeypatch, tmp_path):
    nasty = dataclasses.replace(sample, class_names=NASTY)
    monkeypatch.setattr(data.sample, "load", lambda root, config: nasty)
    folder = tmp_path / "_|`\udcff\n$x^ '\"><script>"
    shutil.copytree(table, folder)
    (folder / "results.md").write_bytes(
        "\xb1".encode("latin-1") + (folder / "results.md").read_bytes()
    )
    runs = [folder / name for name in ("byol-random-seed0", "_other")]
    shutil.copytree(*runs)
    for named, sections in (([folder], SECTIONS), (runs, ["Evaluations", *SECTIONS[2:]])):
        text = report.main([*map(str, named)]).read_text("utf-8")
        page = Page(text)
        assert page.text["h2"] == sections
        known = {"html", "meta", "title", "style", "h1", "h2", "h3", "p", "section", "figure"}
        known |= {"img", "figcaption", "div", "table", "tr", "td", "th", "ul"}
        known |= {"thead", "tbody"}
        assert {tag for tag, _ in page.tags} <= known | {"li", "code", "pre", "details", "summary"}
        assert all(a["src"].startswith("data:") for tag, a in page.tags if tag == "img")
        assert {key for _, a in page.tags for key in a} <= {
            "lang", "charset", "name", "content", "style", "class", "src", "alt",
        }  # fmt: skip
        for name in NASTY:
            shown = name.encode(errors="backslashreplace").decode()
            assert any(shown in figure for figure in page.text["figure"])
    rows = re.findall("(?s)<tr>(.*?)</tr>", text)
    assert len({row.count("<td>") + row.count("<th>") for row in rows}) == 1


def test_many_classes_fit_on_a_page():
    rng, names = np.random.default_rng(0), [f"class {i}" for i in range(120)]
    truth, guess = rng.integers(0, 120, (2, 500))
    guess[truth == 7] = 8
    (axes,) = confusion_figure(truth, guess, names).axes
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert len(shown) == 25 and "class 7" in shown
    assert not map_figure(rng.normal(size=(500, 2)), truth, names).legends


def test_the_map_shows_the_directions_of_largest_variance(sample, trained_run, monkeypatch):
    monkeypatch.setattr(report, "picture", lambda draw, text, points, *rest: points)
    features = report.Features(trained_run, 0)
    x = torch.nn.functional.normalize(features.features, dim=1)
    singular = torch.linalg.svdvals(x - x.mean(0))[:2]
    lengths = sorted(np.linalg.norm(features.map(), axis=0), reverse=True)
    assert lengths == pytest.approx(singular.tolist(), rel=1e-3)
    features.test = [None]  # only their number counts here
    assert features.map().shape == (1, 2)


def test_data_that_is_gone_costs_only_the_sections_that_need_it(table, monkeypatch):
    from core.errors import UserError

    def gone(config):
        raise UserError("--data-root gone: no such folder")

    monkeypatch.setattr(report.datasets, "load", gone)
    text = report.main([str(table)]).read_text()
    assert "Left out: --data-root gone: no such folder" in text
    assert Page(text).text["h2"] == [*SECTIONS[:3], "Features"]


@pytest.mark.parametrize("make, text", [(False, "no such folder"), (True, "no finished run")])
def test_a_folder_without_runs_is_one_line(tmp_path, capsys, make, text):
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
    with pytest.raises(SystemExit) as stop:
        report.main([str(folder)])
    assert stop.value.code == 2 and text in capsys.readouterr().err
