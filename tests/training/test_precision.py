"""Which arithmetic is chosen, and the scaler's state."""

import pytest
import torch

from core.errors import UserError
from training import loop as module
from training.loop import Precision, pick_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("native, expected", [(True, "bf16"), (False, "fp32")])
def test_auto_on_cpu_is_bf16_where_it_is_native(monkeypatch, native, expected):
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: native)
    assert pick_precision("auto", CPU) == expected
    assert pick_precision("fp32", CPU) == "fp32" and pick_precision("bf16", CPU) == "bf16"


@pytest.mark.parametrize("capability, expected", [((9, 0), "bf16"), ((8, 0), "bf16"),
                                                  ((7, 5), "fp16")])  # fmt: skip
def test_auto_on_cuda_is_fp16_before_ampere(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", CUDA) == expected
    if expected == "fp16":
        with pytest.raises(UserError, match="--precision bf16"):
            pick_precision("bf16", CUDA)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
@pytest.mark.filterwarnings("error")  # torch's: that it disables autocast
def test_auto_is_fp32_where_nothing_was_tried_and_others_are_refused_or_used(monkeypatch, kind):
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: True)
    device = torch.device(kind)
    assert pick_precision("auto", device) == "fp32"
    for name in ("fp32", "bf16", "fp16") if kind == "mps" else ("fp32", "bf16"):
        assert pick_precision(name, device) == name
        with Precision(name, device).autocast():
            assert torch.is_autocast_enabled(kind) == (name != "fp32")
    if kind == "xpu":
        with pytest.raises(UserError, match="--precision fp16: .* xpu .*bf16"):
            pick_precision("fp16", device)


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16),
                                         ("fp16", torch.float16)])  # fmt: skip
def test_autocast_has_the_type(name, dtype):
    with Precision(name, CPU).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def stepped(precision, gradient: float) -> bool:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    precision.scaler.scale((weight * gradient).sum()).backward()
    applied = precision.step(optimizer)
    assert applied is not torch.equal(weight, torch.ones(2))
    return applied


def test_R19_the_scaler_goes_on_from_its_state():
    precision = Precision("fp16", CPU)
    assert not stepped(precision, 1e38) and stepped(precision, 1e-3)
    again = Precision("fp16", CPU)
    again.load_state_dict(precision.scaler.state_dict())
    assert again.scaler.get_scale() == precision.scaler.get_scale() == 2.0**15
    assert again.scaler.state_dict() == precision.scaler.state_dict()


def test_growth_of_the_scale_is_not_a_skip():
    precision = Precision("fp16", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    assert stepped(precision, 1.0) and stepped(precision, 1.0)
    assert precision.scaler.get_scale() == 16


def test_R19_a_state_without_scaler_leaves_it_as_it_starts():
    assert Precision("fp32", CPU).scaler.state_dict() == {}
    precision = Precision("fp16", CPU)
    precision.load_state_dict({})
    assert precision.scaler.get_scale() == 2.0**16
    Precision("fp32", CPU).load_state_dict(Precision("fp16", CPU).scaler.state_dict())


def test_without_scaler_every_step_is_applied():
    assert stepped(Precision("fp32", CPU), 1.0) and stepped(Precision("bf16", CPU), 1.0)
