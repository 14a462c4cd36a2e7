"""The schedules' values, from their formulas."""

import math

import pytest

from training.loop import peak_rate, warmup_steps
from training.method import learning_rate


def test_rate_at_the_landmarks():
    total, warmup, peak = 1000, 100, 3.2
    values = {k: learning_rate(peak, k, warmup, total) for k in (0, 50, 100, 550, 999)}
    print({k: round(v, 8) for k, v in values.items()})
    assert values[0] == 0
    assert values[50] == pytest.approx(1.6)
    assert values[100] == pytest.approx(3.2)
    assert values[550] == pytest.approx(1.6)
    # 1 - cos(x) = x^2 / 2 near the end
    assert values[999] == pytest.approx(3.2 * (math.pi / 900) ** 2 / 4, rel=1e-4)


def test_rate_rises_and_then_falls_towards_0():
    values = [learning_rate(1.0, k, 20, 200) for k in range(200)]
    assert values[:21] == sorted(values[:21])
    assert values[20:] == sorted(values[20:], reverse=True)
    assert max(values) == values[20] == 1 and 0 < values[-1] < 1e-4


def test_without_warmup_the_first_step_has_the_full_rate():
    assert learning_rate(0.5, 0, 0, 10) == 0.5


@pytest.mark.parametrize(
    "epochs, steps_per_epoch, total, expected",
    [(10, 25, 25000, 250), (10, 312.775, 12511, 3128), (10, 25, 400, 200), (0.5, 10, 1000, 5),
     (10, 5, 9, 4), (0, 5, 99, 0)],  # the second: the authors' preset of 40 epochs
)  # fmt: skip
def test_warmup_is_as_typed_and_at_most_half_of_the_run(epochs, steps_per_epoch, total, expected):
    assert warmup_steps(epochs, steps_per_epoch, total) == expected


def test_rate_scales_with_the_batch_except_for_adam():
    assert peak_rate("lars", 0.2, 4096) == pytest.approx(3.2)
    assert peak_rate("sgd", 0.05, 128) == pytest.approx(0.025)
    assert peak_rate("adamw", 0.001, 4096) == 0.001
