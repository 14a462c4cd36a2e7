"""Collapse figures against plain formulas and known cases."""

import math

import numpy as np
import pytest
import torch

from eval.collapse import alignment, collapse_figures, effective_rank, spread, uniformity


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
