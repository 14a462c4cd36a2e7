"""The table's arithmetic against scipy and closed forms, and what it prints."""

import itertools
import json
import re

import numpy as np
import pytest
from scipy import stats

from eval.pictures import accuracy_figure, curves_figure, save
from eval.report import to_html
from eval.table import T975, Cells, markdown, paired_interval


def test_the_quantiles_are_students():
    np.testing.assert_allclose(T975, stats.t.ppf(0.975, np.arange(1, 31)), atol=6e-4)


def test_one_seed_is_the_paired_t_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(70, 3, 8), rng.normal(68, 3, 8)
    mean, half = paired_interval((a - b)[None])
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx(tuple(interval), rel=1e-3)


def test_seeds_and_draws_add_their_variances():
    difference = np.array([[1.0, 2.0, 4.0], [2.0, 2.5, 5.5]])
    seeds, draws = difference.mean(1), difference.mean(0)
    v = np.array([np.var(seeds, ddof=1) / 2, np.var(draws, ddof=1) / 3])
    freedom = int(v.sum() ** 2 / (v[0] ** 2 / 1 + v[1] ** 2 / 2))
    mean, half = paired_interval(difference)
    assert mean == pytest.approx(difference.mean())
    assert half == pytest.approx(stats.t.ppf(0.975, freedom) * v.sum() ** 0.5, rel=1e-3)
    # more seeds that agree tell no more about the draws
    again = paired_interval(np.repeat(difference[:1], 5, axis=0))[1]
    assert again == pytest.approx(paired_interval(difference[:1])[1], rel=0.05)


def test_intervals_cover_what_they_promise():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(1000):
        noise = rng.normal(size=(1, 6)) + rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(3, 6))
        mean, half = paired_interval(noise)
        hits += abs(mean) <= half
    assert 930 <= hits <= 1000


def test_one_value_has_no_interval():
    assert paired_interval(np.array([[2.5]])) == (2.5, None)
    assert paired_interval(np.full((1, 3), 2.5)) == (2.5, None)


def filled(path) -> Cells:
    """Two budgets; byol with 2 seeds and 3 draws, its fine-tuning and the baseline with 2 draws."""
    cells = Cells(path, write=True)

    def add(name, init, labels, draw, seed, top1):
        cells.add((name, init, labels, draw, seed), top1=top1, seconds=1.5,
                  protocol="features-linear", test_images=4000)  # fmt: skip

    for labels, gain in ((100, 5.0), (500, -1.0)):
        for draw in range(3):
            add("raw-pixels", "none", labels, draw, 0, 60.0 + draw)
            for seed in range(2):
                add("random-encoder", "none", labels, draw, seed, 50.0 + draw + seed)
                add("byol-linear", "random", labels, draw, seed, 64.0 + 2 * draw + seed)
        for draw in range(2):
            add("baseline", "random", labels, draw, 0, 55.0 + draw)
            for seed in range(2):
                add("byol-finetune", "random", labels, draw, seed,
                    55.0 + gain + 1.1 * draw + 0.1 * seed)  # fmt: skip
    return cells


def test_rows_are_means_over_seeds_and_draws(tmp_path):
    rows = filled(tmp_path / "cells.jsonl").rows()
    assert len(rows) == 10
    row = next(r for r in rows if (r["name"], r["labels"]) == ("byol-linear", 500))
    assert row["top1_mean"] == pytest.approx(np.mean([64, 65, 66, 67, 68, 69]))
    assert row["top1_std"] == pytest.approx(np.std([64.5, 66.5, 68.5], ddof=1))
    assert (row["draws"], row["pretrain_seeds"], row["test_images"]) == (3, 2, 4000)
    assert (row["init"], row["protocol"], row["seconds"]) == ("random", "features-linear", 1.5)
    keys = {"name", "init", "labels", "protocol", "top1_mean", "top1_std", "draws",
            "pretrain_seeds", "test_images", "seconds"}  # fmt: skip
    assert all(keys <= r.keys() for r in rows)
    json.dumps(rows)  # plain numbers


def test_claims_are_paired_over_draws_and_seeds(tmp_path):
    claims = filled(tmp_path / "cells.jsonl").claims("byol")
    assert len(claims) == 6
    found = {(c["claim"], c["labels"]): c for c in claims}
    tuned = found["byol-finetune - baseline", 100]
    difference = np.array([[5.0, 5.1], [5.1, 5.2]])
    mean, half = paired_interval(difference)
    assert tuned["difference"] == pytest.approx(mean, abs=1e-3)
    assert tuned["interval"] == pytest.approx([mean - half, mean + half], abs=1e-3)
    assert (tuned["draws"], tuned["pretrain_seeds"]) == (2, 2)
    # seed by seed against the random encoder: each difference is 14 + draw
    linear = found["byol-linear - random-encoder", 100]
    assert linear["difference"] == pytest.approx(15)
    pixels = found["byol-linear - raw-pixels", 100]
    assert pixels["difference"] == pytest.approx(np.mean([4, 5, 6, 5, 6, 7]))
    assert found["byol-finetune - baseline", 500]["interval"][1] < 0


def test_cells_are_kept_and_skipped(tmp_path):
    path = tmp_path / "cells.jsonl"
    cells = filled(path)
    again = Cells(path, write=True)
    assert again.cells == cells.cells
    assert ("baseline", "random", 100, 1, 0) in again
    assert ("baseline", "random", 100, 2, 0) not in again
    silent = Cells(path, write=False)
    before = path.read_bytes()
    silent.add(("x", "none", 1, 0, 0), top1=1.0)
    assert path.read_bytes() == before


def test_a_damaged_cell_is_measured_again_and_costs_no_other(tmp_path):
    path = tmp_path / "cells.jsonl"
    count = len(filled(path).cells)
    damaged = b'{"name": "\xff"}\n[1]\n{"name": "x"}\n\xff\xfe\n'
    path.write_bytes(damaged + path.read_bytes()[:-20])
    cells = Cells(path, write=True)
    missing = ("byol-finetune", "random", 500, 1, 1)
    assert len(cells.cells) == count - 1 and missing not in cells
    cells.add(missing, top1=1.0, seconds=1.0, protocol="network", test_images=1)
    cells.add(("new", "none", 500, 1, 1), top1=1.0, seconds=1.0, protocol="network", test_images=1)
    again = Cells(path, write=True)
    assert missing in again and len(again.cells) == count + 1


def test_markdown_has_a_line_a_row_and_the_claims_whatever_their_sign(tmp_path):
    cells = filled(tmp_path / "cells.jsonl")
    text = markdown(cells.rows(), cells.claims("byol"), "The title", ["a note"])
    lines = text.splitlines()
    assert lines[0] == "# The title" and "a note" in lines
    header = next(line for line in lines if line.startswith("| row"))
    assert "| 100 labels | 500 labels |" in header
    row = next(line for line in lines if line.startswith("| byol-linear | random |"))
    assert row.count("66.5 ± 2.0") == 2
    assert row.count("|") == header.count("|")
    assert any(line.startswith("- features-linear: frozen encoder") for line in lines)
    claims = [line for line in lines if line.startswith("| byol-finetune - baseline")]
    assert len(claims) == 2
    assert "+5.10" in claims[0] and claims[0].endswith("| yes |")
    assert "-0.90" in claims[1] and claims[1].endswith("| no, the opposite |")


@pytest.mark.parametrize("seeds, holds", [(1, "yes, over these draws"), (3, "yes")])
def test_one_pretraining_seed_says_nothing_of_others(tmp_path, seeds, holds):
    cells = Cells(tmp_path / "cells.jsonl", write=False)
    for draw in range(4):
        for seed in range(seeds):
            for name, top1 in (("byol-finetune", 70), ("baseline", 60)):
                key = (name, "random", 100, draw, seed if name != "baseline" else 0)
                top1 += (draw * len(name) + seed) / 9
                cells.add(key, top1=top1, seconds=1.0, protocol="network",
                          test_images=9)  # fmt: skip
    text = markdown(cells.rows(), cells.claims("byol"), "x", [])
    (claim,) = [line for line in text.splitlines() if line.startswith("| byol-finetune - base")]
    assert claim.endswith(f"| {holds} |")
    assert ("run at least three" in text) is (seeds == 1)


NASTY = [
    "a|b",
    "`",
    "c`d",
    "line\nbreak",
    "\r| x |",
    "\udcff",
    "_x",
    "\u2028|---|",
    "<b>",
    "\\|",
    "$",
]


def test_any_name_is_a_cell_of_its_own():
    rows = [dict(name=name, init="none", labels=20, top1_mean=50.0 + i, top1_std=None, draws=1,
                 pretrain_seeds=1, seconds=1.0, protocol="unknown") for i, name in enumerate(NASTY)
            ]  # fmt: skip
    text = markdown(rows, [], "The title\n|---|", ["`a\n|---|`", "", "\udcff"])
    text.encode()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(NASTY) and {line.count("|") for line in lines} == {7}
    page = to_html(text)
    assert page.count("<tr>") == 1 + len(NASTY) and page.count("<td>") == 6 * len(NASTY)
    assert page.count("<code>") == page.count("</code>") == 1 and page.count("<h1>") == 1
    names = re.findall("<tr>\n<td>(.*?)</td>", page)
    assert names == [
        r"a\u007cb", r"\u0060", r"c\u0060d", r"line\u000abreak", r"\u000d\u007c x \u007c",
        r"\udcff", "_x", r"\u2028\u007c---\u007c", "&lt;b&gt;", "\\\\u007c", "$",
    ]  # fmt: skip


def test_one_draw_is_printed_without_spread_or_verdict(tmp_path):
    cells = Cells(tmp_path / "cells.jsonl", write=True)
    for name, top1 in (("byol-finetune", 70.0), ("baseline", 60.0)):
        cells.add(
            (name, "random", 100, 0, 0), top1=top1, seconds=1, protocol="network", test_images=10
        )
    claims = cells.claims("byol")
    assert claims[0]["interval"] is None and claims[0]["difference"] == 10
    text = markdown(cells.rows(), claims, "t", [])
    assert "not shown" in text and "±" not in text.split("Top-1")[0]
    save(tmp_path / "one.png", accuracy_figure, cells.rows(), "t")


def test_facts_that_differ_between_budgets_are_all_printed(tmp_path):
    cells = Cells(tmp_path / "cells.jsonl", write=False)
    for labels, draws, seconds in ((100, 4, 1.0), (500, 1, 2.0), (1000, 1, 1.0)):
        for draw, seed in itertools.product(range(draws), range(2)):
            key = ("byol-linear", "random", labels, draw, seed)
            cells.add(key, top1=70, seconds=seconds, protocol="network", test_images=9)
    text = markdown(cells.rows(), [], "t", [])
    assert "| 4 x 2, 1 x 2, 1 x 2 | 1.0, 2.0, 1.0 | network |" in text


def test_equal_differences_are_not_called_one_draw(tmp_path):
    cells = Cells(tmp_path / "cells.jsonl", write=False)
    for name, draw in itertools.product(("byol-finetune", "baseline"), range(2)):
        values = dict(top1=len(name), seconds=1.0, protocol="network", test_images=9)
        cells.add((name, "random", 100, draw, 0), **values)
    text = markdown(cells.rows(), cells.claims("byol"), "t", [])
    assert "none: equal differences" in text and "one draw" not in text


def test_the_curves_are_those_that_were_logged():
    rows = [{"step": s, "knn_top1": 50.0 + s, "std/projection": 0.1} for s in (0, 99)]
    figure = curves_figure({"a": rows, "b": [{"step": 0, "loss": 4.0}]})
    shown = {axes.get_title(): axes for axes in figure.axes}
    assert list(shown) == ["loss", "k-NN top-1, %", "std per dimension, projection"]
    first, second = shown["k-NN top-1, %"].lines
    assert first.get_xydata().tolist() == [[1, 50], [100, 149]] and not len(second.get_xydata())
    assert [text.get_text() for text in figure.legends[0].texts] == ["a", "b"]


def test_claims_pair_draws_by_their_number(tmp_path):
    cells = Cells(tmp_path / "cells.jsonl", write=False)
    other = dict(seconds=1.0, protocol="network", test_images=10)
    for draw, a, b in ((0, 70.0, 60.0), (1, 80.0, None), (2, 75.0, 68.0)):
        cells.add(("byol-linear", "random", 100, draw, 0), top1=a, **other)
        if b:
            cells.add(("raw-pixels", "none", 100, draw, 0), top1=b, **other)
    (claim,) = cells.claims("byol")
    assert claim["draws"] == 2 and claim["difference"] == 8.5
