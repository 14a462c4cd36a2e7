"""The scripts as a user types them, on a tiny network."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import TINY, distance, metrics, momentum, state_of, trained
from sklearn.metrics import balanced_accuracy_score

import finetune
import linear_eval
import reproduce
import train_baseline
import train_byol
from core.files import lock_folder
from data import datasets
from eval import online, supervised
from eval.features import extract
from eval.protocols import PROTOCOLS
from eval.trained import load_classifier
from variants.simsiam import SimSiam

ROOT = Path(train_byol.__file__).parent
TORCHRUN = ["-m", "torch.distributed.run"]  # what `torchrun` runs


def command(*arguments, cwd=ROOT) -> subprocess.Popen:
    """`python ...` in a process of its own, with its output in one text."""
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finished(process: subprocess.Popen, code: int = 0, limit: float = 300) -> str:
    try:
        output, _ = process.communicate(timeout=limit)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def python(*arguments, code: int = 0, cwd=ROOT) -> str:
    return finished(command(*arguments, cwd=cwd), code)


def test_L1_three_spellings_are_one_run(tmp_path):
    """Bit for bit; against one process, the first loss, gradient and running statistics."""
    recipe = tmp_path / "a recipe.toml"
    recipe.write_text(TINY)
    shared = [f"--recipe={recipe}", "--device", "cpu", "--optimizer", "sgd", "--steps", "3",
              "--batch-size", "32", "--save-every", "1", "--keep", "3", "--quiet"]  # fmt: skip
    spellings = {
        "one": ["train_byol.py"],
        "python": ["train_byol.py", "--gpus", "2"],
        "torchrun": [*TORCHRUN, "train_byol.py", "--gpus", "2"],
        "nproc": [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "train_byol.py"],
    }
    running = {
        name: command(*words, *shared, "--out", tmp_path / "with space" / name)
        for name, words in spellings.items()
    }
    try:
        for process in running.values():
            finished(process)
    finally:
        for process in running.values():
            process.terminate()
    outs = {name: tmp_path / "with space" / name for name in spellings}
    rows = {name: metrics(out) for name, out in outs.items()}
    assert rows["python"] == rows["torchrun"] == rows["nproc"] and len(rows["python"]) == 3
    assert len({trained(outs[name], 3) for name in ("python", "torchrun", "nproc")}) == 1

    # float32 allows no more than one step; tests/test_scaling.py compares more in float64
    one, two = outs["one"], outs["python"]
    assert rows["python"][0]["loss"] == pytest.approx(rows["one"][0]["loss"], rel=1e-5)
    assert distance(momentum(two, 1), momentum(one, 1)) < 0.1
    states = [state_of(out, 1) for out in (one, two)]
    assert [state["processes"] for state in states] == [1, 2]
    for name, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], value, rtol=1e-4, atol=1e-5, msg=name)
    config = json.loads((tmp_path / "with space" / "python" / "config.json").read_text())
    assert "--gpus" in config["command"]


def test_a_variant_is_a_module_with_the_same_flags(tmp_path, recipe):
    out = tmp_path / "run"
    flags = ["--recipe", recipe, "--out", out, "--steps", "2", "--batch-size", "32"]
    text = python("-m", "variants.simsiam", *flags, "--gpus", "2")
    assert "simsiam on sample" in text and "2 x cpu" in text
    assert state_of(out, 2)["kind"] == "simsiam"
    assert -1.01 <= metrics(out)[0]["loss"] <= 1.01


def test_L2_two_numbers_of_processes_that_differ(tmp_path, recipe):
    text = python(*TORCHRUN, "--standalone", "--nproc-per-node", "2", "train_byol.py", "--recipe",
                  recipe, "--gpus", "3", "--out", tmp_path / "run", code=1)  # fmt: skip
    assert "--gpus 3: the launcher started 2" in text
    assert not (tmp_path / "run").exists()


def test_pretrain_then_evaluate_as_the_readme_says(tmp_path, recipe):
    """From another folder, with the default run folders."""
    text = python(ROOT / "train_byol.py", "--recipe", recipe, cwd=tmp_path)
    assert "next: python linear_eval.py --ckpt runs/byol-sample" in text
    run = tmp_path / "runs" / "byol-sample"
    assert "k-NN" not in text and (run / "result.json").exists()

    text = python(ROOT / "linear_eval.py", "--ckpt", "runs/byol-sample", cwd=tmp_path)
    result = json.loads((run / "linear" / "result.json").read_text())
    assert (result["name"], result["test_images"], result["labels"]) == ("byol-linear", 4000, 1000)
    assert 15 < result["top1"] < 90
    assert "next: python finetune.py --ckpt runs/byol-sample" in text

    flags = ["--recipe", recipe, "--labels", "40", "--draw", "1"]
    running = [command(ROOT / "finetune.py", "--ckpt", "runs/byol-sample", *flags, cwd=tmp_path),
               command(ROOT / "train_baseline.py", *flags, cwd=tmp_path)]  # fmt: skip
    for process in running:
        assert "top-1" in finished(process)
    tuned = json.loads((run / "finetune-labels40-draw1" / "result.json").read_text())
    base = json.loads((tmp_path / "runs" / "baseline-sample" / "result.json").read_text())
    for result in (tuned, base):
        assert (result["labels"], result["test_images"], result["steps"]) == (40, 4000, 5)
        assert (result["measured_on"], result["draw"]) == ("test", 1)


def test_reproduce_from_the_command_line_needs_a_recipe(tmp_path):
    text = python("reproduce.py", "--out", tmp_path / "table", code=2)
    assert text.startswith("error: --recipe is missing") and text.count("\n") == 1
    assert not (tmp_path / "table").exists()


# In this process from here on: main() is what the shell calls.


@pytest.fixture
def run(sample, recipe, tmp_path) -> Path:
    out = tmp_path / "run"
    train_byol.main(argv=["--recipe", recipe, "--out", str(out), "--quiet", "--steps", "2"])
    return out


CPU = ["--device", "cpu", "--threads", "1", "--quiet"]


def test_heads_on_frozen_features(run):
    before = torch.load(run / "encoder.pt", weights_only=True)["state_dict"]
    linear = linear_eval.main(["--ckpt", str(run), *CPU, "--linear.strength", "0.1"])
    flags = ["--ckpt", str(run), *CPU, "--head", "mlp", "--mlp.steps", "20", "--labels", "50"]
    mlp = linear_eval.main(flags)
    assert (linear["protocol"], linear["chosen"]) == ("features-linear-fixed", "L2 0.1")
    assert (linear["name"], linear["labels"]) == ("byol-linear", 100)
    assert (mlp["name"], mlp["labels"]) == ("byol-mlp", 50)
    for name in ("linear", "mlp-labels50-draw0"):
        saved = torch.load(run / name / "classifier.pt", weights_only=True)
        assert all(torch.equal(v, before[k]) for k, v in saved["encoder"].items())
        assert saved["classes"][0] == "t-shirt" and saved["feature_mean"].shape == (64,)


def test_inputs_are_normalised_by_the_pretraining_images(run, sample):
    """By their own statistics, kept with the weights: not those of another data set."""
    meta = torch.load(run / "encoder.pt", weights_only=True)["meta"]
    pixels = sample.pretraining("train+unlabelled")[0].take(np.arange(320)).double() / 255
    assert meta["mean"] == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert meta["std"] == pytest.approx(pixels.transpose(0, 1).flatten(1).std(1).tolist(), rel=1e-3)


def test_every_result_says_what_it_rests_on(run, recipe):
    """The protocol's name, the sizes of the splits, labels, seeds: in each kind of result."""
    flags = ["--ckpt", str(run), *CPU, "--labels", "20", "--draw", "3", "--seed", "5"]
    results = {
        "features-linear": linear_eval.main(flags),
        "features-mlp": linear_eval.main([*flags, "--head", "mlp"]),
        "features-knn": linear_eval.main([*flags, "--head", "knn"]),
        "augmented-linear": linear_eval.main(
            [*flags, "--protocol", "augmented", "--augmented.epochs", "2"]
        ),
        "network": finetune.main(flags),
        "network-sweep": finetune.main([*flags, "--sweep", "--finetune.sweep-lr", "0.1",
                                        "--finetune.sweep-epochs", "1", "2"]),
    }  # fmt: skip
    for protocol, result in results.items():
        assert protocol in PROTOCOLS and result["protocol"] == protocol
        said = [result[k] for k in ("dataset", "labels", "draw", "seed", "fold")]
        assert said == ["sample", 20, 3, 5, -1]
        assert (result["measured_on"], result["test_images"]) == ("test", 100)
        assert result["pretrain_seed"] == 0 and 0 <= result["top1"] <= 100
    assert {p.parent.name for p in run.rglob("*/result.json")} >= {
        f"{name}-labels20-draw3"
        for name in ("linear", "mlp", "knn", "augmented", "finetune", "finetune-sweep")
    }


def test_nearest_neighbours_come_in_all_four_kinds(run):
    result = linear_eval.main(["--ckpt", str(run), *CPU, "--head", "knn"])
    # the bank has 100 images: no figure is called one of 200 neighbours
    kinds = ("cosine_5nn", "cosine_20nn", "cosine_100nn", "euclidean_5nn")
    assert kinds == tuple(k for k in result if k.endswith("nn"))
    assert all(0 <= result[k] <= 100 for k in kinds) and result["top1"] == result["cosine_20nn"]
    assert len({result[k] for k in kinds}) > 1
    assert not (run / "knn" / "classifier.pt").exists()


def test_a_sweep_chooses_inside_the_labels_and_then_uses_all_of_them(run, monkeypatch):
    seen = []
    original = supervised.train

    def watched(config, job, split, watch, trials=()):
        seen.append((config.optim.lr, config.optim.epochs, split))
        return original(config, job, split, watch, trials)

    monkeypatch.setattr(supervised, "train", watched)
    flags = ["--ckpt", str(run), *CPU, "--labels", "50", "--sweep"]
    grid = ["--finetune.sweep-lr", "0", "0.2", "--finetune.sweep-epochs", "1", "8"]
    result = finetune.main([*flags, *grid])
    *trials, (lr, epochs, final) = seen
    assert [t[:2] for t in trials] == [(0, 1), (0, 8), (0.2, 1), (0.2, 8)]
    for _, _, part in trials:
        assert part.test.index is not None  # train images
        assert set(part.train.index) | set(part.test.index) == set(final.train.index)
        assert (len(part.train), len(part.test)) == (40, 10)
    assert (len(final.train), final.test.index) == (50, None)
    held = [t["held_out_top1"] for t in result["trials"]]
    best = result["trials"][held.index(max(held))]
    assert (lr, epochs) == (best["lr"], best["epochs"]) == (result["lr"], epochs)
    folders = sorted(p.name for p in (run / "finetune-sweep-labels50-draw0" / "sweep").iterdir())
    assert folders == ["lr0-epochs1", "lr0-epochs8", "lr0.2-epochs1", "lr0.2-epochs8"]
    trial = json.loads(next((run / "finetune-sweep-labels50-draw0").rglob("lr0.2*/result.json"))
                       .read_text())  # fmt: skip
    assert (trial["measured_on"], trial["test_images"]) == ("validation", 10)
    saved = json.loads((run / "finetune-sweep-labels50-draw0" / "config.json").read_text())
    optim = saved["config"]["optim"]
    assert [optim[k] for k in ("lr", "epochs", "steps")] == [None] * 3  # the sweep sets them


SWEEP = ["--labels", "40", "--sweep", "--finetune.sweep-lr", "0.1", "0.2",
         "--finetune.sweep-epochs", "2"]  # fmt: skip


def test_a_sweep_stopped_at_any_time_goes_on(run, tmp_path, monkeypatch):
    """SIGTERM in the second trial: saved, exit 75; --resume repeats nothing and ends the same."""
    whole = finetune.main(["--ckpt", str(run), *CPU, *SWEEP, "--out", str(tmp_path / "whole")])
    flags = ["--ckpt", str(run), *CPU, *SWEEP, "--out", str(tmp_path / "out")]
    trained, original = [], supervised.Session.steps

    def steps(session):
        trained.append(session.folder.out.name)
        for step in original(session):
            if len(trained) == 2 and step.index == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    monkeypatch.setattr(supervised.Session, "steps", steps)
    with pytest.raises(SystemExit) as stop:
        finetune.main(flags)
    assert stop.value.code == 75 and trained == ["lr0.1-epochs2", "lr0.2-epochs2"]
    assert not (tmp_path / "out" / "result.json").exists()
    trained += ["resumed"]
    again = finetune.main([*flags, "--resume"])
    assert trained[3:] == ["lr0.2-epochs2", "out"]
    assert [again[k] for k in ("top1", "trials", "lr")] == [
        whole[k] for k in ("top1", "trials", "lr")
    ]
    assert finetune.main([*flags, "--resume"])["complete"]
    assert not list((tmp_path / "out" / "sweep").rglob("*.pt"))  # their figures are of use only


def test_a_sweep_goes_on_after_a_trial_that_diverges(run, tmp_path, capsys):
    flags = ["--ckpt", str(run), *CPU, *SWEEP[:3], "--finetune.sweep-epochs", "3"]
    out = ["--out", str(tmp_path / "out")]
    result = finetune.main([*flags, "--finetune.sweep-lr", "1e12", "0.1", *out])
    assert [trial["held_out_top1"] > 0 for trial in result["trials"]] == [False, True]
    assert result["lr"] == 0.1
    with pytest.raises(SystemExit) as stop:
        finetune.main([*flags, "--finetune.sweep-lr", "1e12", *out, "--overwrite"])
    assert stop.value.code == 1 and "lower --finetune.sweep-lr" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--lr", "--epochs", "--steps"])
def test_what_a_sweep_chooses_is_not_typed(run, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--ckpt", str(run), *CPU, *SWEEP, flag, "3", "--out", str(tmp_path / "no")])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and f"{flag}: not with --sweep" in text
    assert not (tmp_path / "no").exists()


def test_a_signal_between_two_trials_is_not_lost(run, tmp_path, monkeypatch):
    original = supervised.extract

    def extract(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(supervised, "extract", extract)
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--ckpt", str(run), *CPU, *SWEEP, "--out", str(tmp_path / "out")])
    assert stop.value.code == 75 and len(list(tmp_path.rglob("result.json"))) == 1 + 1  # the run's


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(run, tmp_path, capsys):
    flags = ["--ckpt", str(run), *CPU, "--out", str(tmp_path / "out")]
    finetune.main([*flags, *SWEEP])
    with pytest.raises(SystemExit) as stop:
        finetune.main([*flags, *SWEEP, "--labels", "20", "--resume"])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "--labels 40 -> 20" in text and text.count("\n") == 1


@pytest.mark.parametrize("first, second", [(["--sweep"], []), ([], ["--sweep"]),
                                           (["--folds"], []), ([], ["--folds"])])  # fmt: skip
def test_many_runs_in_a_folder_overwrite_nothing_unless_asked(
    run, folds, recipe, tmp_path, capsys, first, second
):
    grid = ["--baseline.sweep-lr", "0.1", "--baseline.sweep-epochs", "1"]
    flags = [*CPU, "--recipe", recipe, *grid, "--out", str(tmp_path / "out")]
    train_baseline.main([*flags, *first])
    kept = (tmp_path / "out" / "result.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train_baseline.main([*flags, *second])
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "result.json").read_bytes() == kept
    train_baseline.main([*flags, *second, "--overwrite"])
    (old,) = [p for p in tmp_path.iterdir() if p.name.startswith("out-")]
    assert (old / "result.json").read_bytes() == kept
    below = {p.name for p in (tmp_path / "out").iterdir()}
    assert ("sweep" in below) == ("--sweep" in second) and ("fold3" in below) == (
        "--folds" in second
    )


def test_nesterov_momentum_reaches_the_optimizer(run, tmp_path):
    def weights(name, *flags):
        finetune.main(["--ckpt", str(run), *CPU, *flags, "--out", str(tmp_path / name)])
        return torch.load(tmp_path / name / "encoder.pt", weights_only=True)["state_dict"]

    plain, nesterov = weights("a", "--no-nesterov"), weights("b", "--nesterov")
    assert not torch.equal(plain["conv1.weight"], nesterov["conv1.weight"])


def test_the_next_command_has_the_recipe_and_the_flags_of_the_data(run, recipe):
    for own in (["--dataset", "sample", "--labels", "40"], ["--folds"]):
        flags = ["--ckpt", str(run), "--recipe", str(recipe), *own]
        text = linear_eval.next_command(linear_eval.configure([*flags, "--head", "knn"]))
        assert sorted(shlex.split(text)) == sorted(["python", "finetune.py", *flags])


def test_fine_tuning_without_a_recipe_is_the_papers(run, tmp_path):
    """App. C.2: SGD with Nesterov momentum .9, no weight decay, crop and flip; rates and epochs."""
    shutil.copy(run / "encoder.pt", tmp_path)
    c = finetune.configure(["--ckpt", str(tmp_path / "encoder.pt"), "--dataset", "sample"])
    assert (c.optim.optimizer, c.optim.nesterov, c.optim.momentum) == ("sgd", True, 0.9)
    assert c.optim.weight_decay == 0 and c.method.shift == 0
    assert c.method.sweep_lr == [0.005, 0.01, 0.02, 0.05, 0.1] and c.method.sweep_epochs == [30, 50]


def test_pretraining_is_watched_on_train_images(sample, recipe, tmp_path, monkeypatch):
    given = []

    def spy(encoder, images, *rest):
        given.append(images)
        return extract(encoder, images, *rest)

    monkeypatch.setattr(online, "extract", spy)
    flags = ["--recipe", recipe, "--out", str(tmp_path / "run"), "--quiet", "--steps", "2"]
    result = train_byol.main(argv=[*flags, "--knn-every", "1", "--online-probe"])
    watched = [images.take(np.arange(len(images))) for images in given]
    known = sample.train.take(np.arange(100)).flatten(1).tolist()
    assert all(image in known for images in watched for image in images.flatten(1).tolist())
    assert len(watched) == 1 and len(watched[0]) == 100
    # a probe trained while the encoder changes is called that, not linear evaluation
    assert {"knn_top1", "online_probe_top1"} <= set(result) and "top1" not in result


@pytest.fixture
def folds(sample, monkeypatch) -> list:
    """Ten folds of 20, as STL-10 has ten of 1,000."""
    starts = [np.arange(f, 100, 10) for f in range(10)]
    folds = [np.sort(np.concatenate([rows, (rows + 1) % 100])) for rows in starts]
    full = dataclasses.replace(sample, folds=folds)
    monkeypatch.setattr(datasets, "load", lambda config: full)
    return folds


@pytest.mark.parametrize("script", [linear_eval, finetune, train_baseline])
def test_folds_are_ten_results_and_their_mean(run, folds, recipe, tmp_path, script):
    flags = [*CPU, "--recipe", recipe]
    flags += [] if script is train_baseline else ["--ckpt", str(run)]
    one = script.main([*flags, "--fold", "7", "--out", str(tmp_path / "one")])
    result = script.main([*flags, "--folds", "--out", str(tmp_path / "out")])
    assert len(result["folds"]) == 10 and result["folds"][7] == one["top1"]
    assert result["top1"] == pytest.approx(np.mean(result["folds"]), abs=1e-3)
    assert result["top1_std"] == pytest.approx(np.std(result["folds"], ddof=1), abs=1e-3)
    assert (result["fold"], result["labels"], result["test_images"]) == ("all", 20, 100)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result


@pytest.fixture
def unequal(sample, monkeypatch) -> datasets.Dataset:
    """The sample with one test image of class 0, two of class 1, and so on."""
    rows = [np.flatnonzero(sample.test_labels == c)[: c + 1] for c in range(10)]
    rows = np.concatenate(rows)
    few = dict(test=sample.test.subset(rows), test_labels=sample.test_labels[rows])
    unequal = dataclasses.replace(sample, **few)
    monkeypatch.setattr(datasets, "load", lambda config: unequal)
    return unequal


HEADS = ["--head linear", "--head mlp --mlp.steps 20", "--head knn", "--protocol augmented"]


@pytest.mark.parametrize("flags", [*HEADS, "finetune", "baseline"])
def test_the_mean_per_class_is_that_of_the_test_images(
    run, unequal, recipe, tmp_path, capsys, flags
):
    out, script = tmp_path / "out", {"finetune": finetune, "baseline": train_baseline}.get(flags)
    words = ["--out", str(out), *CPU[:-1]]
    words += ["--recipe", recipe] if flags == "baseline" else ["--ckpt", str(run)]
    words += flags.split() if script is None else ["--steps", "10"]
    if flags.endswith("augmented"):
        words += "--augmented.epochs 2 --augmented.rates 0.4".split()
    result = (script or linear_eval).main(words)
    if flags == "--head knn":  # writes no classifier
        assert result["mean_per_class"] != result["top1"]
    else:
        frozen, classifier, _ = load_classifier(str(out), "cpu")
        guess = classifier(frozen(unequal.test)).argmax(1)
        expected = 100 * balanced_accuracy_score(unequal.test_labels, guess)
        assert result["mean_per_class"] == pytest.approx(expected, abs=1e-4)
    assert f"(mean per class {result['mean_per_class']:.2f} %) on 55" in capsys.readouterr().out


def test_results_are_measured_on_what_they_say(run, recipe):
    flags = ["--ckpt", str(run), *CPU, "--recipe", recipe, "--labels", "30"]
    result = finetune.main([*flags, "--evaluate-on", "validation"])
    assert (result["measured_on"], result["test_images"], result["labels"]) == (
        "validation",
        70,
        30,
    )
    assert (run / "finetune-labels30-draw0-validation" / "encoder.pt").exists()


def test_finetuning_starts_from_the_checkpoint_and_the_baseline_does_not(run, recipe, tmp_path):
    kept = torch.load(run / "encoder.pt", weights_only=True)["state_dict"]["conv1.weight"]
    flags = ["--recipe", recipe, *CPU, "--lr", "0", "--out"]
    finetune.main(["--ckpt", str(run), *flags, str(tmp_path / "tuned")])
    train_baseline.main([*flags, str(tmp_path / "base")])
    tuned, base = (torch.load(tmp_path / name / "encoder.pt", weights_only=True)
                   for name in ("tuned", "base"))  # fmt: skip
    assert torch.equal(tuned["state_dict"]["conv1.weight"], kept)
    assert not torch.equal(base["state_dict"]["conv1.weight"], kept)
    # what the encoder was pretrained with is what its images are normalized with
    assert (
        tuned["meta"]["mean"] == torch.load(run / "encoder.pt", weights_only=True)["meta"]["mean"]
    )


def test_reproduce_writes_every_row_and_skips_what_is_done(sample, recipe, tmp_path, capsys):
    out = tmp_path / "table"
    flags = ["--recipe", recipe, "--out", str(out), "--mlp.steps", "5"]
    reproduce.main(argv=flags)
    rows = json.loads((out / "results.json").read_text())
    names = ["raw-pixels", "random-encoder", "baseline", "byol-knn", "byol-linear", "byol-mlp",
             "byol-finetune"]  # fmt: skip
    assert {(r["name"], r["labels"]) for r in rows} == {(n, b) for n in names for b in (20, 40)}
    assert all(r["draws"] == 2 and r["test_images"] == 100 for r in rows)
    assert all(0 <= r["top1_mean"] <= 100 for r in rows)
    text = (out / "results.md").read_text()
    assert all(f"| {name} |" in text for name in names)
    assert "byol-finetune - baseline" in text and "byol-linear - raw-pixels" in text
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")

    def trained_files():
        return {p: p.stat().st_mtime_ns for p in out.rglob("*.pt")}

    cells, files = (out / "cells.jsonl").read_bytes(), trained_files()
    capsys.readouterr()
    reproduce.main(argv=flags)
    assert (out / "cells.jsonl").read_bytes() == cells and trained_files() == files
    assert json.loads((out / "results.json").read_text()) == rows
    # one cell lost: that one is measured again, to the same figure
    lines = cells.decode().splitlines(keepends=True)
    (out / "cells.jsonl").write_text("".join(lines[:-1]))
    reproduce.main(argv=flags)
    again = (out / "cells.jsonl").read_text().splitlines()
    assert len(again) == len(lines)
    assert json.loads(again[-1])["top1"] == json.loads(lines[-1])["top1"]


def test_reproduce_refuses_to_mix_settings(sample, recipe, tmp_path, capsys):
    out = tmp_path / "table"
    flags = ["--recipe", recipe, "--out", str(out), "--mlp.steps", "5"]
    reproduce.main(argv=flags)
    cells = (out / "cells.jsonl").read_bytes()
    others = ["--mlp.steps", "6"], ["--evaluate-on", "validation"], ["--batch-norm", "local"]
    for other in others:
        with pytest.raises(SystemExit) as stop:
            reproduce.main(argv=[*flags, *other])
        assert stop.value.code == 2 and "another --out" in capsys.readouterr().err
    settings = json.loads((out / "settings.json").read_text())
    settings["flags"]["data.download"] = True
    (out / "settings.json").write_text(json.dumps(settings))
    reproduce.main(argv=[*flags, "--data-root", str(tmp_path), "--strict", "--keep", "3"])
    assert (out / "cells.jsonl").read_bytes() == cells


def test_S12_two_tables_in_one_folder(sample, recipe, tmp_path, capsys):
    (tmp_path / "table").mkdir()
    with lock_folder(tmp_path / "table"):
        with pytest.raises(SystemExit) as stop:
            reproduce.main(argv=["--recipe", recipe, "--out", str(tmp_path / "table")])
    assert stop.value.code == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    assert not (tmp_path / "table" / "settings.json").exists()


def test_a_checkpoint_on_the_way_is_evaluated_beside_the_run(run):
    path = sorted((run / "checkpoints").glob("step-*.pt"))[0]
    flags = ["--ckpt", str(path), *CPU, "--head", "knn"]
    result = linear_eval.main(flags)
    assert result["pretrain_step"] == int(path.stem.removeprefix("step-"))
    assert (run / f"knn-{path.stem}" / "result.json").exists()


def test_settings_are_chosen_without_test_images(sample, recipe, tmp_path):
    """In every row, what is measured on are the labelled images outside the draw."""
    out = tmp_path / "table"
    flags = ["--recipe", recipe, "--out", str(out), "--mlp.steps", "5", "--quiet"]
    reproduce.main(argv=[*flags, "--evaluate-on", "validation", "--reproduce.first-draw", "1000"])
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert len({c["name"] for c in cells}) == 7 and {c["draw"] for c in cells} == {1000, 1001}
    assert all(c["test_images"] == 100 - c["labels"] for c in cells)


def test_reproduce_runs_in_two_processes(sample, recipe, tmp_path, float64):
    """In lockstep, as the same table; one rank's files are there when the other reads them."""
    flags = ["--recipe", recipe, "--mlp.steps", "5", "--precision", "fp32"]

    def table(out):
        reproduce.main(argv=[*flags, "--out", str(out)])

    forked.run(table, tmp_path / "two", ranks=2)
    reproduce.main(argv=[*flags, "--out", str(tmp_path / "one")])
    losses = [
        [r["loss"] for r in metrics(tmp_path / n / "byol-random-seed0")] for n in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert [(r["name"], r["labels"]) for r in one] == [(r["name"], r["labels"]) for r in two]
    for a, b in zip(one, two, strict=True):
        assert abs(a["top1_mean"] - b["top1_mean"]) <= 1, a["name"]  # of 100 test images


def test_an_evaluation_starts_from_the_recipe_of_its_run(run):
    """finetune.py --ckpt RUN alone has the recipe's steps, rate and batch; flags still win."""
    config = finetune.configure(["--ckpt", str(run)])
    assert (config.optim.steps, config.optim.batch_size) == (5, 20)
    assert finetune.configure(["--ckpt", str(run), "--steps", "9"]).optim.steps == 9


PRETRAIN, LABELLED = train_byol.main, train_baseline.main
WRONG = {
    "tau above 1": (PRETRAIN, "--byol.base-tau 1.5", "--byol.base-tau"),
    "unknown flag": (PRETRAIN, "--no-such 1", "--no-such"),
    "missing recipe": (PRETRAIN, "--recipe nowhere.toml", "nowhere.toml"),
    "batch larger than the data": (PRETRAIN, "--batch-size 5000", "there are only 320"),
    "batch of one": (PRETRAIN, "--batch-size 1", "--batch-size 1"),
    "batch that can't be cut": (PRETRAIN, "--batch-size 10 --accumulate 4", "--batch-size 10"),
    "missing folder": (PRETRAIN, "--dataset folder --data-root nowhere", "nowhere"),
    "no data": (PRETRAIN, "--dataset stl10 --data-root nowhere", "--download"),
    "missing weights": (PRETRAIN, "--init nowhere.pt", "nowhere.pt"),
    "missing checkpoint": (PRETRAIN, "--resume nowhere.pt", "nowhere.pt"),
    "no gpus, before the data": (
        PRETRAIN,
        "--dataset folder --data-root nowhere --device cuda",
        "--device cuda",
    ),
    "an unknown device, before the data": (
        PRETRAIN,
        "--dataset folder --data-root nowhere --device warp",
        "--device warp",
    ),
    "a numbered device": (PRETRAIN, "--device cuda:1", "CUDA_VISIBLE_DEVICES"),
    "more gpus than there are": (PRETRAIN, "--device cuda --gpus 99", "cuda"),
    "more labels than there are": (LABELLED, "--labels 500", "--labels 500"),
    "labels that are no multiple": (LABELLED, "--labels 15", "multiple of 10"),
    "a fold of another data set": (LABELLED, "--fold 3", "--fold 3"),
    "nothing left to validate on": (LABELLED, "--evaluate-on validation", "--labels"),
    "no checkpoint": (linear_eval.main, "", "--ckpt"),
    "missing run": (linear_eval.main, "--ckpt nowhere", "nowhere"),
    "a folder that is no run": (finetune.main, "--ckpt .", "encoder.pt"),
    "unknown head": (linear_eval.main, "--ckpt . --head tree", "--head"),
    "folds and labels": (LABELLED, "--folds --labels 20", "leave out --labels"),
    "folds and a fold": (LABELLED, "--folds --fold 2", "leave out --labels and --fold"),
    "a file to resume a sweep": (LABELLED, "--sweep --resume tiny.toml", "--resume alone"),
    "a sweep of too few labels": (
        LABELLED,
        "--sweep --labels 20 --batch-size 50",
        "only 20 training images",
    ),
    "a rate of LARS in Adam": (PRETRAIN, "--optimizer adamw --lr 0.45", "adamw wants about 1e-3"),
    "folds of another data set": (LABELLED, "--folds", "--fold 0"),
    "a sweep of one image a class": (LABELLED, "--sweep --labels 10", "each class has one"),
}


@pytest.mark.parametrize("main, flags, words", WRONG.values(), ids=WRONG)
def test_A1_wrong_input_is_one_line_and_leaves_nothing(
    sample, recipe, tmp_path, monkeypatch, capsys, main, flags, words
):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    base = [] if "--recipe" in flags else ["--recipe", recipe]
    arguments = [*base, "--out", str(tmp_path / "run"), *flags.split()]
    with pytest.raises(SystemExit) as stop:
        main(argv=arguments)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1, text
    assert words in text
    assert set(tmp_path.rglob("*")) == before


def test_S13_a_run_is_not_overwritten_unless_asked_to(run, recipe, capsys):
    flags = ["--recipe", recipe, "--out", str(run), "--quiet", "--steps", "1"]
    kept = (run / "encoder.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        train_byol.main(argv=flags)
    assert stop.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert (run / "encoder.pt").read_bytes() == kept
    train_byol.main(argv=[*flags, "--overwrite"])
    old = [p for p in run.parent.iterdir() if p.name.startswith("run-")]
    assert len(old) == 1 and (old[0] / "encoder.pt").read_bytes() == kept


def test_a_checkpoint_of_another_network_is_refused(run, capsys):
    with pytest.raises(SystemExit) as stop:
        linear_eval.main(["--ckpt", str(run), *CPU, "--width", "0.25"])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "--width" in text and text.count("\n") == 1
    assert not (run / "linear").exists()


def test_a_run_prints_what_it_does(sample, recipe, tmp_path, capsys):
    flags = ["--recipe", recipe, "--out", str(tmp_path / "run"), "--optimizer", "sgd",
             "--lr", "0.4", "--knn-every", "5"]  # fmt: skip
    result = train_byol.main(argv=flags)
    text = capsys.readouterr().out
    for words in ("320 images of 28x28", "views of 16", "resnet18", "stem small", "parameters",
                  "1 x cpu, fp32", "10 steps of 64", "2 epochs", "learning rate 0.1"):  # fmt: skip
        assert words in text, words
    rows = metrics(tmp_path / "run")
    assert [r["step"] for r in rows if "knn_top1" in r] == [4, 9]
    assert result["knn_top1"] == rows[9]["knn_top1"] and f"{result['knn_top1']:.2f} %" in text


def test_images_on_the_device_give_the_same_run(sample, recipe, tmp_path):
    """`always` moves them even on a CPU: the same pixels from one tensor in memory."""
    for where in ("never", "always"):
        flags = ["--recipe", recipe, "--out", str(tmp_path / where), "--steps", "3", "--quiet"]
        train_byol.main(argv=[*flags, "--data-on-device", where])
    assert metrics(tmp_path / "always") == metrics(tmp_path / "never")


def test_resume_refuses_another_method_checkpoint_or_kind_of_run(run, sample, recipe, tmp_path):
    """A result of other weights, or of another command, would pass for this one's."""
    other, out = tmp_path / "other", tmp_path / "out"
    train_byol.main(argv=["--recipe", recipe, "--out", str(other), "--quiet", "--seed", "1"])
    flags = ["--recipe", recipe, "--out", str(other), "--resume"]
    with pytest.raises(SystemExit):
        train_byol.main(SimSiam, flags)
    tune = [*CPU, "--labels", "50", "--out", str(out)]
    finetune.main(["--ckpt", str(run), *tune])
    before = (out / "result.json").read_bytes()
    assert finetune.main(["--ckpt", str(run), *tune, "--resume"])["complete"]
    for words in (["--ckpt", str(other)], ["--ckpt", str(run), "--sweep"]):
        with pytest.raises(SystemExit):
            finetune.main([*words, *tune, "--resume"])
    linear = tmp_path / "linear"
    linear_eval.main(["--ckpt", str(run), "--quiet", "--labels", "50", "--out", str(linear)])
    with pytest.raises(SystemExit):
        finetune.main(["--ckpt", str(run), *tune[:-1], str(linear), "--resume"])
    assert (out / "result.json").read_bytes() == before


def test_an_evaluation_stays_out_of_the_folder_that_the_recipe_names(sample, recipe, tmp_path):
    out = tmp_path / "run"
    text = f"[run]\nout = {json.dumps(str(out))}\noverwrite = true\nquiet = true\n"
    Path(recipe).write_text(Path(recipe).read_text().replace("[run]\n", text))
    train_byol.main(argv=["--recipe", recipe])
    linear_eval.main(["--ckpt", str(out), "--labels", "50"])
    assert (out / "encoder.pt").exists() and (out / "linear-labels50-draw0").is_dir()
    assert len(list(tmp_path.glob("run*"))) == 1


def test_each_fold_has_a_sweep_of_its_own(sample, recipe, tmp_path, monkeypatch):
    whole = supervised.datasets.load

    def load(config):
        data = whole(config)
        return dataclasses.replace(data, folds=[np.arange(50), np.arange(50, 100)])

    monkeypatch.setattr(supervised.datasets, "load", load)
    two = supervised.each_fold
    monkeypatch.setattr(supervised, "each_fold", lambda data, folds: two(data, folds)[:2])
    grid = ["--baseline.sweep-lr", "0.1", "--baseline.sweep-epochs", "1", "--sweep", "--folds"]
    flags = ["--recipe", recipe, "--out", str(tmp_path / "run"), "--quiet", *grid]
    result = train_baseline.main(flags)
    assert len(result["folds"]) == 2 and result["chosen_in_folds"] == [0.1, 0.1]
    assert train_baseline.main([*flags, "--resume"])["complete"]
