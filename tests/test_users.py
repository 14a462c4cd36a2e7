"""Sets of a user's own, as small and odd as they come, through every command."""

import json
import os
import re
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import linear_eval
import reproduce
import train_baseline
import train_byol
from core.errors import UserError
from data import preview
from eval import embed, predict, report, retrieve
from eval.classifiers import STRENGTHS, UNCHOSEN, choose_strength, fit_linear, fit_mlp


def write(root, counts, split="train", seed=0):
    """Images of noise around a shade of each class's own: {class: how many}."""
    rng = np.random.default_rng(seed)
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            path = Path(root, split, name, f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 60, (20, 20, 3)) + 60 * (number % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def own(tmp_path, monkeypatch, recipe):
    """Flags of a folder data set at ./images, in batches of 4."""
    monkeypatch.chdir(tmp_path)
    return ["--recipe", recipe, "--dataset", "folder", "--data-root", "images", "--store-size",
            "16", "--batch-size", "4", "--quiet"]  # fmt: skip


def refused(capsys, script, *arguments) -> str:
    """The one line with which a script refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(argv=[*map(str, arguments)])
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if not line.startswith("warning:")]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), text
    return lines[0]


NAMES = ["caf\udce9", "$x_1$", "a|b`c`", "<script>alert(1)</script>", "_under", "tab\there",
         "line\nfeed", "'\"\\", "日本🐜", " ", "-rf", "%s{0}", "nul", "a:b", "é" * 120, "#1",
         "\u202e\x1b[31m", "~"]  # fmt: skip


def test_names_of_any_signs_go_through_every_command(own, tmp_path, capsys):
    for split, count in (("train", 3), ("test", 1)):
        write("images", dict.fromkeys(NAMES, count), split)
    train_byol.main(argv=[*own, "--out", "run", "--knn-every", "5"])
    for head in ("linear", "mlp", "knn"):
        linear_eval.main(["--ckpt", "run", "--head", head, "--out", f"run/{head}"])
    finetune.main(["--ckpt", "run", "--batch-size", "4", "--steps", "2", "--out", "tuned"])
    baseline = ["--out", "base", "--evaluate-on", "test"]
    train_baseline.main([*own, *baseline])
    count = len(NAMES)
    assert len(predict.main(["--ckpt", "run", "--json", "images/test"])) == count
    assert len(predict.main(["--ckpt", "tuned", "images/test"])) == count
    found = retrieve.main(["--ckpt", "run", "--query", "images/test", "--gallery", "images/train"])
    assert len(found) == count
    embed.main(["--ckpt", "run", "--out", "features.npz"])
    saved = np.load("features.npz")
    assert len(saved["files"]) == 4 * count and len(set(saved["classes"].tolist())) == count
    page = report.main(["run", "base"]).read_text("utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "Left out" not in page
    capsys.readouterr()


def test_a_folder_of_its_own_output_stays_the_set_it_was(own, tmp_path, capsys):
    """Pretraining and looking at it, twice, in a folder of loose images: six images each time."""
    for i in range(6):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    here = [word if word != "images" else "." for word in own if word != "--quiet"]
    for number in range(2):
        train_byol.main(argv=[*here, "--out", f"runs/{number}", "--knn-every", "5"])
        assert "folder: 6 images of" in capsys.readouterr().out
        retrieve.main(["--ckpt", f"runs/{number}", "--query", "0.png", "--gallery", ".",
                       "--out", f"alike{number}.png"])  # fmt: skip
        assert "2.png" in capsys.readouterr().out
        preview.main(["--recipe", own[1], *here[2:-2], "--out", f"preview{number}.png"])
        embed.main(["--ckpt", f"runs/{number}", "--out", f"features{number}.npz"])
        assert len(np.load(f"features{number}.npz")["files"]) == 6
        report.main([f"runs/{number}"])


def test_R16_other_images_in_the_same_place_are_refused(own, capsys):
    """Whether a run is resumed or a table is continued."""
    write("images", {"a": 4, "b": 4})
    write("images", {"a": 2, "b": 2}, "test")
    run, table = [*own, "--out", "run", "--steps", "2"], [*own, "--methods", "byol", "simsiam"]
    table += ["--reproduce.budgets", "4"]
    train_byol.main(argv=[*run, "--stop-after", "1"])
    reproduce.main(argv=[*table, "--out", "table"])
    write("images", {"a": 4, "b": 4}, seed=1)
    assert "digest of the images" in refused(capsys, train_byol, *run, "--resume")
    text = refused(capsys, reproduce, *table, "--out", "table")
    assert "holds a table of other images" in text


def test_of_two_processes_one_prints_each_warning(own, tmp_path):
    """A phone's images: what is wrong with them is printed once."""
    write("images", {"a": 5, "b": 5})
    Path("images/train/a/IMG_1.jpg").touch()
    for n in range(3):
        Path(f"images/train/b/IMG_{n}.HEIC").touch()
    run = [word for word in own if word != "--quiet"] + ["--out", "run"]
    children = forked.Children(lambda: train_byol.main(argv=run), ranks=2)
    outcomes = children.wait()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    text = "".join(outcome.output for outcome in outcomes)
    assert text.count("ignored: 3 .heic") == 1 == text.count("warning:")
    assert sum("IMG_1.jpg" in line for line in text.splitlines()) == 1


def test_a_table_needs_labels(own, tmp_path, capsys):
    for i in range(6):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{i}.png")
    flags = [word if word != "images" else "." for word in own if word not in ("--batch-size", "4")]
    text = refused(capsys, reproduce, *flags, "--out", "table")
    assert "no labelled train and test images" in text and not Path("table").exists()


def test_validation_needs_no_test_folder(own, tmp_path, capsys):
    write("images", {"a": 10, "b": 10})
    on = ["--evaluate-on", "validation", "--labels", "8"]
    train_byol.main(argv=[*own, "--out", "run"])
    assert linear_eval.main(["--ckpt", "run", *on])["test_images"] == 12
    assert finetune.main(["--ckpt", "run", *on, "--batch-size", "4"])["test_images"] == 12
    assert train_baseline.main([*own, *on, "--out", "base"])["test_images"] == 12
    text = refused(capsys, linear_eval, "--ckpt", "run")
    assert "test/CLASS" in text
    text = refused(capsys, linear_eval, "--ckpt", "run", "--evaluate-on", "validation")
    assert "without --labels" in text  # names no value that was not given
    recipe = Path("small.toml")
    text = Path(own[1]).read_text().replace("batch_size = 64", "batch_size = 12")
    recipe.write_text(text.replace("batch_size = 20", "batch_size = 4"))
    flags = ["--recipe", recipe, *own[2:own.index("--batch-size")], "--evaluate-on", "validation",
             "--mlp.steps", "2", "--out", "table"]  # fmt: skip
    flags = [*map(str, flags), "--reproduce.budgets"]
    rows = reproduce.main(argv=[*flags, "4", "8"])["rows"]
    assert {(row["labels"], row["test_images"]) for row in rows} == {(4, 16), (8, 12)}
    for budgets, words in (("2", "2: batches of \\[baseline\\] have 4"), ("7", "multiple of 2")):
        text = refused(capsys, reproduce, *flags[:-2], "x", flags[-1], budgets)
        assert re.search(words, text) and not Path("x").exists()


def test_the_only_image_of_a_class_is_learned_from(own, tmp_path, capsys):
    write("images", {"a": 10, "b": 10, "one": 1})
    write("images", {"a": 3, "b": 3}, "test")
    train_byol.main(argv=[*own, "--out", "run"])
    result = linear_eval.main(["--ckpt", "run"])
    assert "not chosen" not in result["chosen"]
    capsys.readouterr()
    finetune.main(["--ckpt", "run", "--sweep", "--finetune.sweep-epochs", "1", "--batch-size", "4"])
    linear_eval.main(["--ckpt", "run", "--protocol", "augmented", "--augmented.epochs", "1"])
    assert json.loads(Path("run/finetune-sweep/result.json").read_text())["trials"]


def test_the_strength_is_chosen_by_the_classes_that_have_several():
    """One image more, of a class of its own, far away from all others, changes no choice."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator)
    labels = (x[:, 0] + torch.randn(60, generator=generator) > 0).long()
    chosen = choose_strength(x, labels)
    assert STRENGTHS[-1] < chosen < STRENGTHS[0]
    more = torch.cat([x, torch.full((1, 8), 0.1)])
    near = choose_strength(more, torch.cat([labels, torch.tensor([2])]))
    assert abs(np.log10(near / chosen)) <= 0.5 and near != UNCHOSEN or near == chosen


def test_where_nothing_was_chosen_the_result_says_so():
    x, labels = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    assert fit_linear(x, labels, 3).chosen == "L2 0.1 (not chosen: one image of each class)"
    assert "not chosen" not in fit_linear(x, labels, 3, strength=0.1).chosen


def test_nearest_neighbours_are_called_what_they_are(own, tmp_path, capsys):
    write("images", {"a": 3, "b": 4})
    write("images", {"a": 2, "b": 2}, "test")
    train_byol.main(argv=[*own, "--out", "run"])
    result = linear_eval.main(["--ckpt", "run", "--head", "knn"])
    assert {k for k in result if k.endswith("nn")} == {"cosine_5nn", "cosine_7nn", "euclidean_5nn"}
    assert result["top1"] == result["cosine_7nn"]
    few = linear_eval.main(["--ckpt", "run", "--head", "knn", "--labels", "4"])
    assert {k for k in few if k.endswith("nn")} == {"cosine_4nn", "euclidean_4nn"}


def test_one_class_is_nothing_to_tell_apart(own, tmp_path, capsys):
    write("images", {"alone": 6})
    write("images", {"alone": 2}, "test")
    train_byol.main(argv=[*own, "--out", "run", "--knn-every", "5"])
    for script, flags in (
        (linear_eval, ["--ckpt", "run"]),
        (finetune, ["--ckpt", "run", "--batch-size", "4"]),
        (train_baseline, [*own, "--out", "base"]),
        (reproduce, [word for word in own if word not in ("--batch-size", "4")]),
    ):
        assert "only the class 'alone'" in refused(capsys, script, *flags)
    assert "two classes" in refused(capsys, train_byol, *own, "--out", "x", "--online-probe")


def test_a_head_with_batch_norm_needs_two_images():
    from eval.classifiers import MLPConfig

    with pytest.raises(UserError, match="--head mlp"):
        fit_mlp(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), 2, MLPConfig(), 0)


def test_no_run_renames_or_fills_a_folder_of_images(own, tmp_path, capsys):
    write("images", {"a": 5, "b": 5})
    (tmp_path / "config.json").write_text("{}")  # an old run, which --overwrite would rename
    before = sorted(tmp_path.rglob("*"))
    for out in (".", "images/.."):
        assert "choose another" in refused(capsys, train_byol, *own, "--out", out, "--overwrite")
    assert "choose another" in refused(capsys, train_byol, *own, "--out", "images")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_that_tensorboard_cannot_write_is_refused_at_once(own, capsys):
    write("images", {"a": 5, "b": 5})
    assert "UTF-8" in refused(capsys, train_byol, *own, "--out", os.fsdecode(b"r\xff"))
