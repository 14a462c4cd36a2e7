"""Collapse figures against plain formulas and known cases."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import train_byol
from data.images import Images
from data.transform import EvalTransform
from eval.collapse import (
    alignment,
    collapse_alarms,
    collapse_figures,
    effective_rank,
    spread,
    uniformity,
)
from eval.features import extract
from training.encoder import Encoder


def sphere(count=400, size=32, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=noise, dtype=torch.float64)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_spread_is_that_of_normalised_vectors():
    x = 3 + sphere() * torch.linspace(0.1, 5, 400)[:, None]
    assert spread(x) == pytest.approx(unit(x.numpy()).std(0).mean(), rel=1e-9)
    assert spread(sphere(20000)) == pytest.approx(1 / math.sqrt(32), rel=0.02)
    assert spread(torch.ones(50, 8)) == pytest.approx(0, abs=1e-6)
    assert spread(7 * x) == pytest.approx(spread(x))


def test_effective_rank_is_exp_of_the_entropy_of_singular_values():
    x = sphere(100, 12) @ torch.diag(torch.linspace(0.01, 2, 12).double())
    s = np.sqrt(np.linalg.eigvalsh(x.numpy().T @ x.numpy()))
    p = s / s.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 12])
def test_effective_rank_of_equal_directions_is_their_number(rank):
    q, _ = torch.linalg.qr(sphere(100, 12))
    basis, _ = torch.linalg.qr(sphere(12, 12, 1))
    x = 5 * q[:, :rank] @ basis[:rank]
    assert effective_rank(x) == pytest.approx(rank, rel=1e-3)


def test_alignment_is_the_mean_squared_distance_of_pairs():
    x, y = sphere(), sphere(seed=1)
    expected = np.mean(np.sum((unit(x.numpy()) - unit(y.numpy())) ** 2, axis=1))
    assert alignment(x, y) == pytest.approx(expected)
    assert alignment(x, 5 * x) == pytest.approx(0, abs=1e-12)
    assert alignment(x, -x) == pytest.approx(4)


def test_uniformity_is_over_all_pairs():
    x = unit(sphere(40, 5).numpy())
    pairs = [np.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i in range(40) for j in range(i)]
    found = uniformity(3 * torch.from_numpy(x))
    assert found == pytest.approx(np.log(np.mean(pairs)))
    assert uniformity(torch.ones(9, 4)) == pytest.approx(0, abs=1e-6)
    assert -4 < uniformity(sphere(400, 256)) < -3.8


def test_the_names_say_which_output_is_meant():
    outputs = {
        "representation": torch.stack([sphere(), sphere(seed=1)]),
        "target": torch.stack([sphere(size=8), sphere(size=8, seed=1)]),
        "prediction": torch.zeros(2, 3, 3),
    }
    found = collapse_figures(outputs)
    assert set(found) == {f"{figure}/{name}" for name in ("representation", "target")
                          for figure in ("std", "rank", "uniformity", "alignment")}  # fmt: skip
    assert found["rank/target"] == pytest.approx(effective_rank(outputs["target"][0]), rel=1e-4)
    assert found["alignment/target"] == pytest.approx(alignment(*outputs["target"]), rel=1e-4)
    alone = collapse_figures({"projection": sphere()[None]})
    assert set(alone) == {"std/projection", "rank/projection", "uniformity/projection"}


def test_a_rank_that_falls_to_10_of_512_is_told():
    """From a real ResNet-18 at its start, whose own rank is a small part of 512 too."""
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (300, 3, 4, 4), np.uint8).repeat(4, 2).repeat(4, 3)
    torch.manual_seed(0)
    start = extract(
        Encoder("resnet18", "small"), Images([smooth]), EvalTransform([0.5] * 3, [0.25] * 3)
    )
    low = sphere(300, 10) @ torch.linalg.qr(sphere(512, 10, 1)).Q.T

    def figures(x):
        return collapse_figures({"representation": x[None]})

    sizes = {"representation": 512}
    assert effective_rank(low) < 10
    (text,) = collapse_alarms(figures(low), figures(start), sizes).values()
    assert "representation uses 9." in text and "of 512 dimensions" in text
    assert collapse_alarms(figures(start), figures(start), sizes) == {}
    assert collapse_alarms(figures(sphere(300, 512)), figures(start), sizes) == {}


def test_what_starts_near_collapse_is_no_alarm():
    """As random ReLU networks do: a tenth of 1/sqrt(D), and 9 of 512 dimensions, were measured."""
    start = {"std/representation": 0.1 / math.sqrt(512), "rank/representation": 9.0}
    sizes = {"representation": 512}
    assert collapse_alarms(start, start, sizes) == {}
    assert len(collapse_alarms({k: v / 5 for k, v in start.items()}, start, sizes)) == 2


def test_without_figures_of_the_start_nothing_is_told():
    now = collapse_figures({"projection": torch.ones(1, 30, 8) + 1e-9 * sphere(30, 8)})
    assert collapse_alarms(now, {}, {"projection": 8}) == {}


# No predictor, and a target that is the online network: nothing keeps them from collapsing.
COLLAPSE = "--no-byol.predictor --byol.base-tau 0 --byol.tau-schedule constant".split()


def watched(recipe, out, *flags) -> dict:
    shared = ["--recipe", recipe, "--out", str(out), "--quiet", "--threads", "1"]
    return train_byol.main(argv=[*shared, *flags])


def test_N5_a_total_collapse_is_told_in_plain_words(sample, recipe, tmp_path, capsys):
    flags = ["--steps", "60", "--optimizer", "sgd", "--lr", "0.4", "--knn-every", "20"]
    result = watched(recipe, tmp_path / "bad", *flags, *COLLAPSE)
    text = capsys.readouterr().err
    assert "all images get nearly the same projection" in text and "warning: step " in text
    assert len(result["warnings"]) == len(set(result["warnings"])) == text.count("\n")
    result = watched(recipe, tmp_path / "good", *flags)
    assert result["warnings"] == [] and not capsys.readouterr().err


def test_a_resumed_run_remembers_its_start(sample, recipe, tmp_path, capsys):
    flags = ["--steps", "60", "--optimizer", "sgd", "--lr", "0.4", "--knn-every", "20", *COLLAPSE]
    watched(recipe, tmp_path / "run", *flags, "--stop-after", "30")
    capsys.readouterr()
    result = watched(recipe, tmp_path / "run", *flags, "--resume")
    whole = watched(recipe, tmp_path / "whole", *flags)
    assert result["warnings"] == whole["warnings"] and len(whole["warnings"]) > 1
    told = capsys.readouterr().err
    assert "all images get nearly the same projection" in told


def test_a_run_resumed_after_its_last_step_still_says_it_collapsed(sample, recipe, tmp_path):
    flags = ["--steps", "60", "--optimizer", "sgd", "--lr", "0.4", "--knn-every", "20", *COLLAPSE]
    whole = watched(recipe, tmp_path / "run", *flags)
    (tmp_path / "run" / "result.json").unlink()
    again = watched(recipe, tmp_path / "run", *flags, "--resume")
    assert again["warnings"] == whole["warnings"] != []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", "cifar10_cpu", "imagenette"])
def test_healthy_recipes_are_silent(tmp_path, capsys, name):
    """Their views, optimizer, rate, heads and tau, on the sample's images and for 600 steps."""
    recipe = str(Path(__file__).parents[2] / "recipes" / f"{name}.toml")
    flags = ["--dataset", "sample", "--crop-size", "28", "--stem", "small", "--width", "0.25",
             "--batch-size", "64", "--steps", "600", "--knn-every", "60"]  # fmt: skip
    result = watched(recipe, tmp_path / "run", *flags)
    assert result["warnings"] == [] and "warning" not in capsys.readouterr().err
