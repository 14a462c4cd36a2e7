"""Each variant's loss against a naive one, written out from its paper in loops."""

import math

import pytest
import torch
from torch import nn

from byol.byol import BYOL, whiten
from variants.barlow_twins import BarlowTwins
from variants.dino import DINO
from variants.moco_v3 import MoCoV3
from variants.simclr import SimCLR
from variants.simsiam import SimSiam
from variants.vicreg import VICReg


class Flat(nn.Module):
    """An encoder of one layer."""

    feature_size = 6

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 6)

    def forward(self, x):
        return self.linear(x.flatten(1)).relu()


def method(cls, **options):
    torch.manual_seed(0)
    return cls(Flat(), cls.Config(**options)).double()


def vectors(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def cosine(a, b) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_simsiam_is_the_mean_negative_cosine_of_both_directions():
    (p1, p2), (z1, z2) = p, z = vectors(2, 5, 4), vectors(2, 5, 4) + 1
    expected = 0.0
    for i in range(5):
        expected += -cosine(p1[i].tolist(), z2[i].tolist()) / 2
        expected += -cosine(p2[i].tolist(), z1[i].tolist()) / 2
    loss, _ = method(SimSiam, projection=8, hidden=4).loss({"prediction": p, "projection": z})
    assert loss.item() == pytest.approx(expected / 5)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_is_the_mean_over_all_2n_rows(temperature):
    z = vectors(2, 5, 4)
    rows = [z[v, i].tolist() for i in range(5) for v in range(2)]  # pairs: 2i and 2i + 1
    expected = 0.0
    for i in range(10):
        positive = i ^ 1
        others = [math.exp(cosine(rows[i], rows[k]) / temperature) for k in range(10) if k != i]
        expected -= math.log(math.exp(cosine(rows[i], rows[positive]) / temperature) / sum(others))
    loss, _ = method(SimCLR, temperature=temperature).loss({"projection": z})
    assert loss.item() == pytest.approx(expected / 10)


@pytest.mark.parametrize("spread", [10.0, 1.0, 0.1, 0.01, 0.001])
def test_barlow_twins_normalizes_as_its_authors_do(spread):
    """bn(z1).T @ bn(z2) / batch, with a batch norm without scale and offset."""
    z, weight = spread * vectors(2, 7, 3) + 5, 0.01
    bn = nn.BatchNorm1d(3, affine=False).double()
    c = (bn(z[0]).T @ bn(z[1]) / 7).tolist()
    expected = sum(
        (1 - c[i][j]) ** 2 if i == j else weight * c[i][j] ** 2 for i in range(3) for j in range(3)
    )
    twins = method(BarlowTwins, projection=8, off_diagonal=weight, scale=1.0)
    assert twins.loss({"projection": z})[0].item() == pytest.approx(expected, rel=1e-12)


def test_barlow_twins_is_the_squared_distance_of_the_correlations_to_the_identity():
    z, n, d, weight = vectors(2, 7, 3), 7, 3, 0.01
    z[1] += z[0]
    expected = 0.0
    means = [[sum(z[v, :, i].tolist()) / n for i in range(d)] for v in range(2)]
    for i in range(d):
        for j in range(d):
            a = [x - means[0][i] for x in z[0, :, i].tolist()]
            b = [x - means[1][j] for x in z[1, :, j].tolist()]
            c = sum(x * y for x, y in zip(a, b, strict=True))
            c /= math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
            expected += (1 - c) ** 2 if i == j else weight * c**2
    loss, logs = method(BarlowTwins, projection=8, off_diagonal=weight, scale=1.0).loss(
        {"projection": z}
    )
    assert loss.item() == pytest.approx(expected, rel=1e-4)  # 1e-5 beside the variances
    assert logs["invariance"] + weight * logs["redundancy"] == pytest.approx(loss.item())


def test_vicreg_is_the_weighted_sum_of_its_three_terms():
    z, n, d = 0.7 * vectors(2, 7, 3), 7, 3
    expected = {"invariance": 0.0, "variance": 0.0, "covariance": 0.0}
    for i in range(n):
        expected["invariance"] += (z[0, i] - z[1, i]).square().sum().item() / n / d
    for v in range(2):
        mean = z[v].mean(0)
        for i in range(d):
            for j in range(d):
                c = sum(((z[v, k, i] - mean[i]) * (z[v, k, j] - mean[j])).item() for k in range(n))
                c /= n - 1
                if i == j:
                    expected["variance"] += max(0, 1 - math.sqrt(c + 1e-4)) / d / 2
                else:
                    expected["covariance"] += c**2 / d
    loss, logs = method(VICReg, projection=8).loss({"projection": z})
    assert {k: v.item() for k, v in logs.items()} == pytest.approx(expected)
    # as in the authors' code the variance is the mean of both views' hinges
    total = 25 * expected["invariance"] + 25 * expected["variance"] + expected["covariance"]
    assert loss.item() == pytest.approx(total) and all(v > 0 for v in expected.values())


def test_moco_v3_is_the_sum_of_both_contrasts():
    q, k, t = vectors(2, 5, 4), vectors(2, 5, 4) + 0.5, 0.2
    expected = 0.0
    for a, b in ((0, 1), (1, 0)):
        for i in range(5):
            scores = [math.exp(cosine(q[a, i].tolist(), k[b, j].tolist()) / t) for j in range(5)]
            expected -= 2 * t * math.log(scores[i] / sum(scores)) / 5
    outputs = {"prediction": q.requires_grad_(), "target": k.requires_grad_()}
    loss, _ = method(MoCoV3, temperature=t, hidden=8, projection=4).loss(outputs)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert q.grad.abs().sum() > 0 and k.grad is None


def test_moco_v3_contrasts_whitened_keys_where_asked_for():
    q, k = vectors(2, 5, 4), vectors(2, 5, 4) + 0.5
    plain = method(MoCoV3, hidden=8, projection=4)
    whitening = method(MoCoV3, hidden=8, projection=4, whiten=True)
    loss, _ = whitening.loss({"prediction": q, "target": k})
    assert torch.equal(loss, plain.loss({"prediction": q, "target": whiten(k)})[0])
    assert not torch.allclose(loss, plain.loss({"prediction": q, "target": k})[0])


def test_dino_is_the_mean_cross_entropy_of_large_views_with_all_others():
    options = dict(hidden=8, prototypes=5, local_views=2, local_size=8)
    dino = method(DINO, **options, teacher_temperature=0.2)
    prediction, target = vectors(4, 6, 5).requires_grad_(), vectors(2, 6, 5)
    dino.center += torch.arange(5) / 10
    center, expected, pairs = dino.center.tolist(), 0.0, 0
    for t in range(2):
        for s in range(4):
            if s == t:
                continue
            pairs += 1
            for i in range(6):
                teacher = [math.exp((target[t, i, k].item() - center[k]) / 0.2) for k in range(5)]
                student = [math.exp(prediction[s, i, k].item() / 0.1) for k in range(5)]
                for k in range(5):
                    p, q = teacher[k] / sum(teacher), student[k] / sum(student)
                    expected -= p * math.log(q) / 6
    loss, _ = dino.loss({"prediction": prediction, "target": target})
    assert loss.item() == pytest.approx(expected / pairs)
    loss.backward()
    assert prediction.grad.abs().sum() > 0 and not dino.center.requires_grad
    other = target + 1  # a second micro-batch of the same step
    dino.loss({"prediction": prediction, "target": other})
    assert dino.center.tolist() == center  # until the step is done
    dino.after_step(0.5)
    moved = 0.9 * torch.tensor(center).double() + 0.1 * (target + other).mean((0, 1)) / 2
    torch.testing.assert_close(dino.center, moved)
    assert not dino.seen.any()


def test_dino_makes_two_large_and_some_small_crops_and_its_teacher_follows():
    dino = method(DINO, hidden=8, prototypes=5, local_views=3, local_size=8)
    assert [view.size for view in dino.views] == [0, 0, 8, 8, 8]
    teacher, student = [dino.encoder, dino.head], dino.student
    assert all(not p.requires_grad for m in teacher for p in m.parameters())
    assert all(p.requires_grad for p in student.parameters())
    with torch.no_grad():
        student[0].linear.weight += 1
    before = dino.encoder.linear.weight.clone()
    dino.after_step(0.0)
    change = dino.encoder.linear.weight - before
    torch.testing.assert_close(change, torch.full_like(change, 1 - dino.config.base_tau))


def test_dinos_batch_statistics_are_of_all_crops_of_one_size():
    """The head's are of all crops.  Each network passes its own rows, in the order of the views."""
    dino = method(DINO, hidden=8, prototypes=5, local_views=3, local_size=8)
    views = vectors(5, 6, 3, 8, 8)
    with torch.no_grad():  # student and teacher start equal
        dino.student[0].linear.weight += 0.1
    seen = []
    for name, layer in (("teacher", dino.encoder), ("student", dino.student[0])):
        layer.register_forward_hook(lambda _, x, y, name=name: seen.append((name, len(x[0]))))
    outputs = dino(*views)
    assert sorted(seen) == [("student", 12), ("student", 18), ("teacher", 12)]
    y = dino.encoder(views[:2].flatten(0, 1))
    assert torch.equal(outputs["representation"].flatten(0, 1), y)
    assert torch.equal(outputs["target"].flatten(0, 1), dino.head(y))
    y = torch.cat([dino.student[0](view) for view in views])
    torch.testing.assert_close(outputs["prediction"].flatten(0, 1), dino.student[1](y))


def test_dinos_center_counts_micro_batches_from_before_a_save():
    """A save may follow a step that the gradient scaler has skipped."""
    options = dict(hidden=8, prototypes=5, local_views=2, local_size=8)
    dino, resumed, z = method(DINO, **options), method(DINO, **options), vectors(2, 6, 5)
    outputs = {"target": z, "prediction": vectors(4, 6, 5)}
    dino.loss(outputs)
    resumed.load_state_dict(dino.state_dict())
    for copy in (dino, resumed):
        copy.loss(outputs | {"target": 3 * z})
        copy.after_step(0.0)
        torch.testing.assert_close(copy.center, 0.2 * z.mean((0, 1)))


def test_moco_v3_has_byols_networks_and_target():
    moco = method(MoCoV3, hidden=8, projection=4)
    names = {name for name, _ in moco.named_parameters()}
    assert names == {name for name, _ in method(BYOL, hidden=8, projection=4).named_parameters()}
    outputs = moco(*vectors(2, 6, 3, 8, 8))
    for name in ("projection", "target"):  # the authors' batch norm without scale and offset
        assert_normalized(outputs[name])
    assert outputs["prediction"].mean(1).abs().max() > 1e-3


def test_projections_of_simclr_and_simsiam_end_in_a_batch_norm():
    """SimCLR's has a scale but no offset, SimSiam's neither, as in their authors' code."""
    views = vectors(2, 6, 3, 8, 8)
    simclr, simsiam = method(SimCLR, hidden=8, projection=4), method(SimSiam, projection=8)
    for each in (simclr, simsiam):
        assert_normalized(each(*views)["projection"])
    trained = [p.requires_grad for p in simclr.projector[-1].parameters()]
    assert trained == [True, False] and not simclr.projector[-1].bias.any()
    assert not [*simsiam.projector[-1].parameters()]


def assert_normalized(z):
    """Each feature of each view has mean 0 and variance 1, less where it varied little before."""
    assert z.mean(1).abs().max() < 1e-12
    variance = z.var(1, correction=0)
    assert (variance < 1).all() and variance.median() > 0.8
