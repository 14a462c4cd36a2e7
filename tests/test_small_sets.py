"""The smallest and oddest sets: two images, one image a class, classes that are never tested."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from test_users import refused, write

import finetune
import linear_eval
import reproduce
import train_baseline
import train_byol
from eval import embed, predict, report, retrieve
from variants.barlow_twins import BarlowTwins
from variants.dino import DINO
from variants.moco_v3 import MoCoV3
from variants.simclr import SimCLR
from variants.simsiam import SimSiam
from variants.vicreg import VICReg


@pytest.fixture
def small(tmp_path, monkeypatch) -> list[str]:
    """Flags of a folder data set at ./images; pretraining and labels in batches of 2."""
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"batch_size = \d+", "batch_size = 2", TINY)
    Path("small.toml").write_text(re.sub(r"\bsteps = \d+", "steps = 3", text))
    return ["--recipe", "small.toml", "--dataset", "folder", "--data-root", "images",
            "--store-size", "16", "--quiet"]  # fmt: skip


METHODS = [SimCLR, SimSiam, BarlowTwins, VICReg, MoCoV3, DINO]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_two_images_in_all_are_enough_for_every_method(small, capsys, method):
    write("images", {"": 2}, "unlabelled")
    result = train_byol.main(method, [*small, "--out", "run", "--knn-every", "2"])
    assert result["steps"] == 3 and np.isfinite(result["std/representation"])
    text = refused(capsys, linear_eval, "--ckpt", "run")
    assert "no labelled train and test images" in text


def test_of_two_unlabelled_images_all_is_shown(small, capsys):
    write("images", {"": 2}, "unlabelled")
    train_byol.main(argv=[*small, "--out", "run"])
    assert embed.main(["--ckpt", "run", "--out", "features.npz"])["images"] == 2
    assert np.load("features.npz")["labels"].tolist() == [-1, -1]
    (found,) = retrieve.main(["--ckpt", "run", "--query", "images/unlabelled/1.png", "--gallery",
                              "images"])  # fmt: skip
    assert [Path(near["file"]).name for near in found["nearest"]] == ["1.png", "0.png"]
    assert "Left out: this data set has no labelled" in report.main(["run"]).read_text("utf-8")
    capsys.readouterr()


def test_two_classes_of_one_image_each(small, capsys):
    """Every head is trained; nothing can be chosen, which is said or refused."""
    write("images", {"a": 1, "b": 1})
    write("images", {"a": 1, "b": 1}, "test")
    probed = [*small, "--out", "run", "--knn-every", "2", "--online-probe"]
    assert {"knn_top1", "online_probe_top1"} <= train_byol.main(argv=probed).keys()
    found = {head: linear_eval.main(["--ckpt", "run", "--head", head])
             for head in ("linear", "mlp", "knn")}  # fmt: skip
    assert "not chosen" in found["linear"]["chosen"]
    assert [k for k in found["knn"] if k.endswith("nn")] == ["cosine_2nn", "euclidean_2nn"]
    one = ["--protocol", "augmented", "--augmented.epochs", "1", "--augmented.rates", "0.1"]
    assert linear_eval.main(["--ckpt", "run", *one])["trials"] == {}
    for script, flags in (
        (linear_eval, ["--ckpt", "run", "--protocol", "augmented", "--out", "x"]),
        (finetune, ["--ckpt", "run", "--sweep"]),
        (train_baseline, [*small, "--sweep", "--out", "x"]),
    ):
        assert "each class has one labelled image" in refused(capsys, script, *flags)
    text = refused(capsys, linear_eval, "--ckpt", "run", "--labels", "1")
    assert "--labels 1: must be a multiple of 2" in text
    text = refused(capsys, finetune, "--ckpt", "run", "--batch-size", "4")
    assert "only 2 training images" in text and not Path("x").exists()
    lines = predict.main(["--ckpt", "run", "images/test", "images/train"])
    assert len(lines) == 4
    assert "Left out" not in report.main(["run"]).read_text("utf-8")
    capsys.readouterr()


def test_a_class_that_is_never_tested(small, capsys):
    write("images", {"a": 3, "b": 3, "c": 3})
    write("images", {"a": 1}, "test")
    train_byol.main(argv=[*small, "--out", "run"])
    for head in ("linear", "mlp", "knn"):
        result = linear_eval.main(["--ckpt", "run", "--head", head, "--labels", "3"])
        assert result["top1"] in (0, 100) and result["test_images"] == 1
    train_baseline.main([*small, "--labels", "3", "--out", "base"])
    assert {p for line in predict.main(["--ckpt", "base", "images/test"])
            for p in line["probabilities"]} == {"a", "b", "c"}  # fmt: skip
    assert "Left out" not in report.main(["run", "base"]).read_text("utf-8")
    sweep = ["--labels", "6", "--sweep", "--finetune.sweep-epochs", "1"]
    trials = finetune.main(["--ckpt", "run", *sweep, "--finetune.sweep-lr", "0.1", "0.2"])["trials"]
    text = refused(capsys, finetune, "--ckpt", "run", *sweep, "--accumulate", "4", "--out", "no")
    assert "--sweep: without the held-out fifth 3 images" in text and not Path("no").exists()
    assert len(trials) == 2 and trials[0]["held_out_top1"] in (0, 33.3333, 66.6667, 100)
    capsys.readouterr()


def test_only_what_is_missing_is_named(small, capsys):
    write("images", {"a": 2, "b": 2})
    train_byol.main(argv=[*small, "--out", "run"])
    text = refused(capsys, linear_eval, "--ckpt", "run")
    assert "no labelled test images: --data-root needs test/CLASS/*" in text
    assert "train/" not in text
    on = ["--evaluate-on", "validation", "--labels", "2"]
    assert "--folds" in refused(capsys, linear_eval, "--ckpt", "run", *on[:2], "--folds")
    assert linear_eval.main(["--ckpt", "run", *on, "--head", "knn"])["test_images"] == 2


@pytest.mark.parametrize("methods", [["byol"], ["byol", "simsiam"]], ids=["one", "two"])
def test_a_table_refuses_before_it_measures_anything(small, capsys, methods):
    write("images", {"a": 3, "b": 3})
    write("images", {"a": 1, "b": 1}, "test")
    table = [*small, "--out", "table", "--methods", *methods, "--reproduce.budgets"]
    for words, expected in (
        (["3"], "--reproduce.budgets 3: must be a multiple of 2 classes, and at most 6"),
        (["2", "8"], "--reproduce.budgets 8: must be a multiple of 2 classes, and at most 6"),
        (["2", "6", "--evaluate-on", "validation"], "--reproduce.budgets 6 leaves no labelled"),
    ):
        assert expected in refused(capsys, reproduce, *table, *words)
    text = Path("small.toml").read_text()
    Path("small.toml").write_text(
        text.replace("batch_size = 2", "batch_size = 2\naccumulate = 2", 1)
    )
    assert "can't be cut into 2 equal parts" in refused(capsys, reproduce, *table, "2")
    text = text.replace("batch_size = 2", "batch_size = 8", 1)
    Path("small.toml").write_text(text)
    assert "there are only 6 training images" in refused(capsys, reproduce, *table, "2")
    assert not Path("table").exists()


def test_a_table_of_all_labels_that_there_are(small, capsys):
    write("images", {"a": 2, "b": 1})  # no smaller budget: it would be a multiple of 2
    write("images", {"b": 1}, "test")
    rows = reproduce.main(argv=[*small, "--out", "table", "--reproduce.budgets", "3"])["rows"]
    assert {row["labels"] for row in rows} == {3} and {row["draws"] for row in rows} == {1}
    assert report.main(["table"]).exists()
    capsys.readouterr()


def test_no_run_lies_among_the_images(small, capsys):
    write("images", {"a": 2, "b": 2})
    before = sorted(Path("images").rglob("*"))
    for out in ("images", "images/train", "images/train/a"):
        assert f"--out {out}: " in refused(capsys, train_byol, *small, "--out", out)
    assert sorted(Path("images").rglob("*")) == before
    os.mkdir("images/results")  # an empty folder is free, and a run's own is no image
    loud = [word for word in small if word != "--quiet"]
    for more in ([], ["--overwrite"]):
        train_byol.main(argv=[*loud, "--out", "images/results", *more])
        assert "folder: 4 images of" in capsys.readouterr().out
