"""The table of protocols, and result records."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from data.datasets import LabelledData
from data.labelled import Labelled, Split
from eval.protocols import PROTOCOLS, in_words, of_head, over_folds, record
from training.config import EvalRun

ROOT = Path(__file__).parents[2]


def split() -> Split:
    return Split(Labelled(None, [0] * 30, [1], []), Labelled(None, [0] * 80, None, []))


def test_a_record_holds_what_its_top1_rests_on():
    data = LabelledData(dataset="sample", labels=30, draw=4, evaluate_on="validation")
    config = SimpleNamespace(data=data, run=EvalRun(seed=6))
    found = record("features-linear", "byol-linear", config, split(), 61.23456, chosen="L2 1")
    assert found == {
        "name": "byol-linear", "dataset": "sample", "protocol": "features-linear", "top1": 61.2346,
        "labels": 30, "draw": 4, "fold": -1, "seed": 6, "measured_on": "validation",
        "test_images": 80, "chosen": "L2 1",
    }  # fmt: skip


def test_an_unknown_protocol_is_no_result():
    config = SimpleNamespace(data=LabelledData(), run=EvalRun())
    with pytest.raises(KeyError):
        record("linear", "byol-linear", config, split(), 50.0)


def test_folds_become_their_mean_and_spread():
    each = [dict(top1=50.0 + f, mean_per_class=40.0 + f, cosine_5nn=f) for f in range(10)]
    results = [dict(name="x", fold=f, seconds=2, lr=f / 10, **each[f]) for f in range(10)]
    found = over_folds(results)
    assert found["chosen_in_folds"] == [f / 10 for f in range(10)] and "lr" not in found
    assert found["seconds"] == 20 and found["cosine_5nn"] == 4.5
    assert found["mean_per_class"] == 44.5
    assert found["top1"] == 54.5 and found["top1_std"] == pytest.approx(3.0277, abs=1e-4)
    assert found["fold"] == "all" and found["folds"] == [50.0 + f for f in range(10)]


def test_folds_of_older_code_lack_the_mean_per_class():
    results = [dict(top1=50.0, fold=0), dict(top1=52.0, fold=1, mean_per_class=52.0)]
    found = over_folds(results)
    assert "mean_per_class" not in found
    assert in_words(found) == "top-1 51.00 % ± 1.41 over 2 folds"


def test_the_mean_per_class_is_said_where_it_differs():
    assert in_words({"top1": 61.234, "mean_per_class": 61.2341}) == "top-1 61.23 %"
    text = "top-1 61.23 % (mean per class 50.00 %)"
    assert in_words({"top1": 61.234, "mean_per_class": 50.0}) == text


def test_the_page_on_evaluation_names_every_protocol():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for name in PROTOCOLS:
        assert f"`{name}`" in page, name


def test_a_fixed_strength_is_another_protocol():
    names = [of_head(h, s) for h in ("linear", "mlp", "knn") for s in (0, 0.1)]
    names += [of_head("linear", s, "pixels") for s in (0, 0.1)]
    assert {of_head("linear", s, "augmented") for s in (0, 0.1)} == {"augmented-linear"}
    assert names == ["features-linear", "features-linear-fixed", "features-mlp", "features-mlp",
                     "features-knn", "features-knn", "pixels", "pixels-fixed"]  # fmt: skip
    assert set(names) <= set(PROTOCOLS)
