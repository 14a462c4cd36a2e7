"""Collapse metrics against plain formulas and known cases."""

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
    collapse_metrics,
    collapse_warnings,
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


def test_spread_is_that_of_normalized_vectors():
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
    metrics = collapse_metrics(outputs)
    assert set(metrics) == {f"{metric}/{name}" for name in ("representation", "target")
                            for metric in ("std", "rank", "uniformity", "alignment")}  # fmt: skip
    assert metrics["rank/target"] == pytest.approx(effective_rank(outputs["target"][0]), rel=1e-4)
    assert metrics["alignment/target"] == pytest.approx(alignment(*outputs["target"]), rel=1e-4)
    alone = collapse_metrics({"projection": sphere()[None]})
    assert set(alone) == {"std/projection", "rank/projection", "uniformity/projection"}


def warnings(*rows, first=0):
    """Warnings for (std, rank) of 512 dimensions at the steps `first`, `first` + 1, ..."""
    history = [{"step": first + step, **row} for step, row in enumerate(rows)]
    return collapse_warnings(history, {"representation": 512}, 1)


def test_a_rank_that_falls_to_10_of_512_is_a_warning():
    """Compared with a real untrained ResNet-18, whose rank is far below 512 too."""
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (300, 3, 4, 4), np.uint8).repeat(4, 2).repeat(4, 3)
    torch.manual_seed(0)
    encoder = Encoder("resnet18", "small")
    x = extract(encoder, Images([smooth]), EvalTransform([0.5] * 3, [0.25] * 3))
    low = sphere(300, 10) @ torch.linalg.qr(sphere(512, 10, 1)).Q.T
    assert effective_rank(low) < 10
    start, now, full = (
        collapse_metrics({"representation": y[None]}) for y in (x, low, sphere(300, 512))
    )
    (text,) = warnings(start, now)
    assert "representation uses 9." in text and "of 512 dimensions" in text
    assert warnings(start, start) == warnings(start, full) == []
    assert warnings(start, now, first=5) == []  # the start was not measured


def test_what_starts_near_collapse_is_no_warning():
    """Measured on random ReLU networks: std a tenth of 1/sqrt(D), rank 9 of 512."""
    start = {"std/representation": 0.1 / math.sqrt(512), "rank/representation": 9.0}
    assert warnings(start, start) == []
    assert len(warnings(start, {k: v / 5 for k, v in start.items()})) == 2


def test_each_metric_warns_once_in_order_of_time_and_not_at_first():
    start = {"std/representation": 1.0, "rank/representation": 50.0}
    narrow, both = start | {"std/representation": 0.1}, dict.fromkeys(start, 0.05)
    texts = warnings(start, narrow, both)
    assert "standard deviation 0.1, 1 at" in texts[0] and "uses 0.05 of" in texts[1]
    history = [{"step": 0, **start}, {"step": 19, **narrow}, {"step": 20, **both}]
    assert "0.05, 1 at" in collapse_warnings(history, {"representation": 512}, 20)[0]


RUN = "--steps 60 --optimizer sgd --lr 0.4 --knn-every 20 --quiet --threads 1".split()
# No predictor, and a target that is the online network: nothing prevents collapse.
COLLAPSE = [*RUN, *"--no-byol.predictor --byol.base-tau 0 --byol.tau-schedule constant".split()]


def pretrain(recipe, out, *flags) -> dict:
    return train_byol.main(argv=["--recipe", recipe, "--out", str(out), *flags])


def test_N5_a_total_collapse_is_warned_of_in_plain_words(sample, recipe, tmp_path, capsys):
    result = pretrain(recipe, tmp_path / "bad", *COLLAPSE)
    text = capsys.readouterr().err
    assert "all images get nearly the same projection" in text and "warning: step " in text
    assert text.count("; try a lower --lr (now 0.4); see docs/evaluation.md") == text.count("\n")
    assert len(result["warnings"]) == len(set(result["warnings"])) == text.count("\n")
    result = pretrain(recipe, tmp_path / "good", *RUN)
    assert result["warnings"] == [] and not capsys.readouterr().err


def test_a_resumed_run_has_the_same_warnings(sample, recipe, tmp_path, capsys):
    whole = pretrain(recipe, tmp_path / "whole", *COLLAPSE)["warnings"]
    pretrain(recipe, tmp_path / "run", *COLLAPSE, "--stop-after", "30")
    capsys.readouterr()
    assert pretrain(recipe, tmp_path / "run", *COLLAPSE, "--resume")["warnings"] == whole
    assert "all images get nearly the same projection" in capsys.readouterr().err
    (tmp_path / "run" / "result.json").unlink()  # resumed after its last step
    assert pretrain(recipe, tmp_path / "run", *COLLAPSE, "--resume")["warnings"] == whole
    assert len(whole) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", "cifar10_cpu", "imagenette"])
def test_healthy_recipes_are_silent(tmp_path, capsys, name):
    """Their views, optimizer, rate, heads and tau, on the sample's images and for 600 steps."""
    recipe = str(Path(__file__).parents[2] / "recipes" / f"{name}.toml")
    flags = "--dataset sample --crop-size 28 --stem small --width 0.25 --batch-size 64".split()
    flags += "--steps 600 --knn-every 60 --quiet --threads 1".split()
    result = pretrain(recipe, tmp_path / "run", *flags)
    assert result["warnings"] == [] and "warning" not in capsys.readouterr().err
