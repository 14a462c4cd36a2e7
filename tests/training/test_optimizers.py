"""LARS against numpy in float64, and which parameters are exempt."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from byol.byol import BYOL
from eval.probe import OnlineProbe
from training.encoder import Encoder
from training.method import Method
from training.optimizers import LARS, build_optimizer

RATES = [0.0, 0.3, 0.7, 0.2]


def numpy_lars(weights, gradients, exempt, weight_decay, momentum=0.9, eta=1e-3):
    """All weights after the steps of RATES, from the formulas of the specification."""
    weights = [w.copy() for w in weights]
    velocity = [np.zeros_like(w) for w in weights]
    for lr, now in zip(RATES, gradients, strict=True):
        for i, (w, g) in enumerate(zip(weights, now, strict=True)):
            if not exempt[i]:
                g = g + weight_decay * w
                size, slope = np.sqrt(np.sum(w**2)), np.sqrt(np.sum(g**2))
                g = g * (eta * size / slope if size > 0 and slope > 0 else 1.0)
            velocity[i] = momentum * velocity[i] + g
            weights[i] = w - lr * velocity[i]
    return weights


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_lars_is_the_formula(weight_decay):
    rng = np.random.default_rng(0)
    shapes = [(5, 4), (3, 2, 3, 3), (7,), (4, 4), (6, 2), (3,)]
    exempt = [False, False, True, False, False, True]
    weights = [rng.normal(size=s) for s in shapes]
    weights[3][:] = 0  # a norm of 0: factor 1
    gradients = [[rng.normal(size=s) for s in shapes] for _ in RATES]
    for now in gradients[:2]:
        now[4][:] = 0  # no gradient; with weight decay it is not 0
    expected = numpy_lars(weights, gradients, exempt, weight_decay)

    parameters = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]
    optimizer = build_optimizer("lars", groups, 0.9)
    for lr, now in zip(RATES, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for parameter, g in zip(parameters, now, strict=True):
            parameter.grad = torch.from_numpy(g.copy())
        before = [p.grad.clone() for p in parameters]
        optimizer.step()
        for p, grad in zip(parameters, before, strict=True):
            assert torch.equal(p.grad, grad)  # the gradients are not scribbled on
    for parameter, value in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-12, atol=1e-15)


def test_lars_skips_parameters_without_gradient_and_resumes():
    a, b = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = LARS([a, b], lr=1.0)
    a.grad = torch.ones(2, 2)
    optimizer.step()
    assert (b == 1).all() and not (a == 1).all()

    twin = torch.nn.Parameter(a.detach().clone())
    other = LARS([twin, torch.nn.Parameter(torch.ones(2, 2))], lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.grad = a.grad.clone()
    optimizer.step(), other.step()
    assert torch.equal(a, twin)


def byol() -> BYOL:
    with torch.device("meta"):
        return BYOL(Encoder("resnet18", "imagenet"), BYOL.Config())


def test_groups_of_a_whole_byol_are_kernels_and_all_others():
    method = byol()
    decayed, exempt = method.parameter_groups(0.5)
    names = {id(p): n for n, p in method.named_parameters()}
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.5, 0.0)
    assert exempt["adapt"] is False and decayed.get("adapt", True) is True
    decayed = {names[id(p)] for p in decayed["params"]}
    exempt = {names[id(p)] for p in exempt["params"]}
    # 20 convolutions, 4 linear layers; scale and offset of 20 + 2 norms, 2 biases
    assert (len(decayed), len(exempt)) == (24, 46)
    for name in ("conv1.weight", "layer2.0.downsample.0.weight", "layer4.1.conv2.weight"):
        assert f"encoder.{name}" in decayed
    for name in ("bn1.weight", "bn1.bias", "layer2.0.downsample.1.weight", "layer4.1.bn2.bias"):
        assert f"encoder.{name}" in exempt
    for head in ("projector", "predictor"):
        assert {f"{head}.0.weight", f"{head}.3.weight"} <= decayed
        assert {f"{head}.0.bias", f"{head}.1.weight", f"{head}.1.bias"} <= exempt
    assert not any(name.startswith("target") for name in decayed | exempt)


class Fork(Method):
    """What networks other than ResNets have besides kernels, norms and biases."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 2, 2])), None)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.embedding = nn.Embedding(5, 8)
        self.class_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.layer_scale = nn.Parameter(torch.ones(4, 1, 1))
        self.prototypes = nn.Parameter(torch.randn(6, 8))
        self.head = nn.Linear(8, 2)
        self.frozen = nn.Linear(8, 2).requires_grad_(False)


def names_of(groups, method) -> list[set[str]]:
    names = {id(p): n for n, p in method.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in groups]


def test_what_is_no_kernel_gets_neither_decay_nor_adaptation():
    method = Fork()
    decayed, exempt = names_of(method.parameter_groups(0.5), method)
    assert decayed == {"encoder.0.weight", "attention.in_proj_weight", "attention.out_proj.weight",
                       "head.weight"}  # fmt: skip
    assert {"class_token", "layer_scale", "prototypes", "embedding.weight", "attention.bias_k",
            "encoder.1.weight", "head.bias"} <= exempt  # fmt: skip
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert decayed | exempt == trained


def test_the_probes_kernel_is_as_any_other():
    """As in the authors' code: weight decay and adaptation for its kernel, neither for its bias."""
    method = OnlineProbe(byol(), 10)
    groups = method.parameter_groups(0.5)
    settings = {}
    for group, names in zip(groups, names_of(groups, method), strict=True):
        for name in names & {"probe.weight", "probe.bias"}:
            settings[name] = group["weight_decay"], group.get("adapt", True)
    assert settings == {"probe.weight": (0.5, True), "probe.bias": (0.0, False)}


@pytest.mark.parametrize("name, kind", [("lars", LARS), ("sgd", torch.optim.SGD),
                                        ("adamw", torch.optim.AdamW)])  # fmt: skip
def test_each_optimizer_takes_the_groups(name, kind):
    optimizer = build_optimizer(name, byol().parameter_groups(0.1), 0.8)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    if name != "adamw":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.8}
        assert not any(group.get("nesterov") for group in optimizer.param_groups)
