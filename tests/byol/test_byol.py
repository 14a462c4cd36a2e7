"""The loss, the moving target and the batch statistics against formulas written out here."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from byol.byol import BYOL, mlp, target_decay, whiten
from training.encoder import Encoder


def build(**options) -> BYOL:
    torch.manual_seed(0)
    config = BYOL.Config(**{"hidden": 32, "projection": 16} | options)
    return BYOL(Encoder("resnet18", "small", 1 / 16), config)


def views(count: int = 6, seed: int = 1):
    noise = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 3, 16, 16, generator=noise)


def loss_of(method, q1, q2, z1, z2) -> torch.Tensor:
    outputs = {"prediction": torch.stack([q1, q2]), "target": torch.stack([z1, z2])}
    return method.loss(outputs)[0]


def test_loss_is_the_sum_of_both_crossed_directions():
    rng = np.random.default_rng(0)
    q1, q2, z1, z2 = rng.normal(size=(4, 7, 16))

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def distance(a, b):  # |a/|a| - b/|b||^2 = 2 - 2 cos
        return np.mean(np.sum((unit(a) - unit(b)) ** 2, axis=1))

    expected = distance(q1, z2) + distance(q2, z1)
    found = loss_of(build(), *map(torch.from_numpy, (q1, q2, z1, z2)))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_loss_runs_from_0_to_8_and_starts_near_4():
    method, x = build(), torch.randn(2, 500, 256)
    assert loss_of(method, x[0], x[1], x[1], x[0]).item() == pytest.approx(0, abs=1e-5)
    assert loss_of(method, x[0], x[1], -3 * x[1], -x[0]).item() == pytest.approx(8, abs=1e-5)
    assert loss_of(method, *torch.randn(4, 500, 256)).item() == pytest.approx(4, abs=0.05)


def test_a_zero_vector_has_a_finite_gradient():
    q = torch.zeros(2, 3, 8, requires_grad=True)
    loss_of(build(), q[0], q[1], *torch.randn(2, 3, 8)).backward()
    assert torch.isfinite(q.grad).all()


def test_no_gradient_reaches_the_target_and_every_online_parameter_has_one():
    method = build()
    outputs = method(*views())
    assert not outputs["target"].requires_grad
    method.loss(outputs)[0].backward()
    for name, parameter in method.named_parameters():
        target = name.startswith("target_")
        assert parameter.requires_grad is not target, name
        assert (parameter.grad is None) is target, name


@pytest.mark.parametrize("whiten", [False, True])
def test_loss_detaches_the_target_whatever_forward_gave(whiten):
    z = torch.randn(2, 3, 8, requires_grad=True)
    q = torch.randn(2, 3, 8, requires_grad=True)
    loss_of(build(whiten=whiten), q[0], q[1], z[0], z[1]).backward()
    assert z.grad is None and q.grad is not None


def test_target_starts_as_the_online_network():
    method = build()
    for mine, theirs in pairs(method):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def pairs(method):
    target = [*method.target_encoder.parameters(), *method.target_projector.parameters()]
    online = [*method.encoder.parameters(), *method.projector.parameters()]
    assert len(target) == len(online)
    return zip(target, online, strict=True)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_target_is_the_moving_average_of_the_new_online_weights(schedule):
    method, total, base = build(base_tau=0.7, tau_schedule=schedule).double(), 5, 0.7
    expected = [t.detach().numpy().copy() for t, _ in pairs(method)]
    noise = torch.Generator().manual_seed(3)
    for k in range(total):
        for _, online in pairs(method):
            online.data = torch.randn(online.shape, generator=noise, dtype=torch.float64)
        tau = 1 - (1 - base) * (math.cos(math.pi * k / total) + 1) / 2
        tau = tau if schedule == "cosine" else base
        values = [o.detach().numpy() for _, o in pairs(method)]
        expected = [tau * t + (1 - tau) * o for t, o in zip(expected, values, strict=True)]
        assert method.after_step(k / total)["tau"] == pytest.approx(tau, abs=1e-15)
    for (target, _), value in zip(pairs(method), expected, strict=True):
        np.testing.assert_allclose(target.detach().numpy(), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_endpoints_of_the_moving_average(tau):
    method = build(base_tau=tau, tau_schedule="constant")
    before = [t.detach().clone() for t, _ in pairs(method)]
    for _, online in pairs(method):
        online.data.add_(1)
    method.after_step(0.5)
    for (target, online), old in zip(pairs(method), before, strict=True):
        assert torch.equal(target, online if tau == 0 else old)


def test_moving_average_leaves_the_buffers_alone():
    method = build(base_tau=0.5)
    for name, buffer in method.named_buffers():
        buffer.fill_(7 if name.startswith("target_") else 3)
    method.after_step(0.0)
    for name, buffer in method.named_buffers():
        assert (buffer == (7 if name.startswith("target_") else 3)).all(), name


def test_small_moves_are_not_lost():
    method = build(base_tau=0.9999, tau_schedule="constant")
    for target, online in pairs(method):
        target.data.fill_(1), online.data.fill_(2)
    for _ in range(10):
        method.after_step(0.0)
    for target, _ in pairs(method):
        assert target.dtype == torch.float32
        assert target.mean().item() == pytest.approx(2 - 0.9999**10, abs=2e-6)


def test_target_runs_in_train_mode_and_keeps_its_own_statistics():
    method = build().train()
    assert all(module.training for module in method.modules())
    with torch.no_grad():
        for target, _ in pairs(method):
            target.mul_(1.5)
    v1, v2 = views()
    reference = copy.deepcopy(method.target_encoder).train()
    reference(v1), reference(v2)
    method(v1, v2)
    buffers = dict(method.named_buffers())
    for name, expected in reference.named_buffers():
        assert torch.allclose(buffers[f"target_encoder.{name}"].float(), expected.float()), name
    assert int(method.target_encoder.bn1.num_batches_tracked) == 2
    online, target = method.encoder.bn1.running_mean, method.target_encoder.bn1.running_mean
    assert not torch.allclose(online, target)


def test_batch_statistics_are_those_of_one_view():
    method, (v1, v2) = build().train(), views()
    one = {k: v[0] for k, v in method(v1, v2).items()}
    two = {k: v[0] for k, v in method(v1, 5 + 3 * v2).items()}
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_outputs_are_named_and_stacked_over_views():
    method = build()
    shapes = {k: tuple(v.shape) for k, v in method(*views()).items()}
    wide = method.encoder.feature_size
    assert shapes == {"representation": (2, 6, wide), "projection": (2, 6, 16),
                      "prediction": (2, 6, 16), "target": (2, 6, 16),
                      "target_representation": (2, 6, wide)}  # fmt: skip


def test_tau_goes_from_its_base_to_just_under_1():
    total = 1000
    assert target_decay(0.99, 0) == pytest.approx(0.99, abs=1e-15)
    assert target_decay(0.99, 0.5) == pytest.approx(0.995, abs=1e-15)
    last = target_decay(0.99, (total - 1) / total)
    assert 0 < 1 - last < 0.01 * (math.pi / total) ** 2 / 4 * 1.001
    values = [target_decay(0.99, k / total) for k in range(total)]
    assert values == sorted(values)


def test_heads_start_truncated_at_two_scales():
    head = mlp(256, 1024, 128)
    linear1, norm, relu, linear2 = head
    assert isinstance(norm, nn.BatchNorm1d) and isinstance(relu, nn.ReLU)
    assert (norm.eps, norm.momentum) == (1e-5, 0.1)
    assert linear2.bias is None and (linear1.bias == 0).all()
    assert linear1.weight.shape == (1024, 256) and linear2.weight.shape == (128, 1024)
    for weight in (linear1.weight, linear2.weight):
        scale = weight.shape[1] ** -0.5
        assert 1.97 * scale < weight.abs().max() <= 2 * scale
        # a normal cut at 2 sigma: var = 1 - 4 phi(2) / (Phi(2) - Phi(-2)) = 0.77374
        assert weight.std().item() == pytest.approx(0.77374**0.5 * scale, rel=1e-2)
        assert weight.mean().abs() < 4 * scale / weight.numel() ** 0.5


def correlated(count: int, seed: int = 0) -> torch.Tensor:
    """Two views (2, count, 5) with means of their own, strongly correlated features."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(5, 5)) * [3, 1, 1, 0.5, 0.5]
    return torch.from_numpy(rng.normal(size=(2, count, 5)) @ mixing.T + [[[4.0]], [[-7.0]]])


def test_whitening_is_that_of_the_covariance_of_both_views():
    """Against the conditions that define it: L^-1 is triangular, L L^T is the covariance."""
    z = correlated(400)
    found = whiten(z).numpy()
    x = (z - z.mean(1, keepdim=True)).numpy()
    covariance = np.cov(x.reshape(-1, 5), rowvar=False)
    covariance = covariance / np.sqrt((covariance**2).sum()) + 0.01 * np.eye(5)
    applied = np.linalg.lstsq(x.reshape(-1, 5), found.reshape(-1, 5), rcond=None)[0].T
    np.testing.assert_allclose(applied, np.tril(applied), atol=1e-9)
    np.testing.assert_allclose(applied @ covariance @ applied.T, np.eye(5), atol=1e-9)
    assert (np.diag(applied) > 0).all() and np.linalg.norm(applied, 2) <= 10
    np.testing.assert_allclose(found.mean(1), 0, atol=1e-9)  # of each view


def test_whitened_features_do_not_correlate_and_weak_ones_stay_weak():
    z = correlated(4000)
    z[:, :, 4] = 1e-6 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)).double()
    covariance = np.cov(whiten(z).flatten(0, 1).numpy(), rowvar=False)
    variances = np.diag(covariance)
    weak = variances[4] / variances[:4].max()
    assert weak < 1e-6
    correlation = covariance / np.sqrt(np.outer(variances, variances))
    before = np.corrcoef(z.flatten(0, 1).numpy()[:, :4], rowvar=False)
    off = ~np.eye(4, dtype=bool)
    assert np.abs(correlation[:4, :4][off]).max() < 0.3 < np.abs(before[off]).max()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_whitening_does_not_depend_on_the_scale(scale):
    z = correlated(50)
    torch.testing.assert_close(whiten(scale * z) / scale, whiten(z))


def test_whitening_survives_equal_images_and_fewer_images_than_features():
    method, q = build(whiten=True), torch.randn(2, 7, 5, requires_grad=True)
    for z in (torch.full((2, 7, 5), 1e4 / 3), torch.ones(2, 7, 5)):
        loss_of(method, q[0], q[1], z[0], z[1]).backward()
        assert torch.isfinite(q.grad).all()
    assert torch.isfinite(whiten(torch.randn(2, 3, 64))).all()


def test_whitening_in_float32_is_close_to_float64():
    torch.manual_seed(0)
    z = torch.randn(2, 64, 256, dtype=torch.float64) * torch.logspace(0, -6, 256).double()
    torch.testing.assert_close(whiten(z.float()).double(), whiten(z), rtol=1e-3, atol=1e-4)


def test_predictions_are_compared_with_whitened_targets_where_asked_for():
    z, q = correlated(8), torch.randn(2, 8, 5, dtype=torch.float64)
    outputs = {"prediction": q, "target": z}
    plain, whitened = build(), build(whiten=True)
    assert torch.equal(plain.targets(outputs), z)
    expected = plain.loss({"prediction": q, "target": whiten(z)})[0]
    assert torch.equal(whitened.loss(outputs)[0], expected)
    assert not torch.equal(plain.loss(outputs)[0], expected)
