"""Which devices can be named, and what goes to them."""

import numpy as np
import pytest
import torch

from core.device import fits_on, pick_device, to_device
from core.errors import UserError


@pytest.fixture(params=[None, "cuda", "mps", "xpu"])
def accelerator(request, monkeypatch):
    """The type of the accelerator that torch finds, or None."""
    kind = request.param
    device = kind and torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
    return kind


def test_what_torch_has_can_be_named_and_auto_is_cuda_or_cpu(accelerator):
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == ("cuda" if accelerator == "cuda" else "cpu")
    if accelerator:
        assert pick_device(accelerator) == accelerator


@pytest.mark.parametrize("name", ["cuda", "mps", "xpu", "warp", "CPU", "meta", ""])
def test_other_devices_are_refused_with_what_there_is(accelerator, name):
    if name == accelerator:
        return
    with pytest.raises(UserError) as error:
        pick_device(name)
    there = f"cpu or {accelerator}" if accelerator else "cpu"
    expected = f"--device {name}: torch finds no such device here; use {there}"
    assert str(error.value) == expected


@pytest.mark.parametrize("name", ["cuda:1", "mps:0", "cpu:0"])
def test_a_number_is_refused(accelerator, name):
    with pytest.raises(UserError, match=f"--device {name}: .*CUDA_VISIBLE_DEVICES"):
        pick_device(name)


def test_float64_goes_to_a_cpu_alone():
    doubles = np.ones(3)
    assert to_device(doubles, torch.device("cpu")).dtype == torch.float64
    assert to_device(doubles, torch.device("meta")).dtype == torch.float32
    assert to_device(np.ones(3, np.int64), torch.device("meta")).dtype == torch.int64


@pytest.mark.parametrize("kind", ["cpu", "mps", "xpu"])
def test_images_stay_where_they_are_but_on_cuda(kind):
    assert not fits_on(torch.device(kind), 1)  # and no driver is asked
