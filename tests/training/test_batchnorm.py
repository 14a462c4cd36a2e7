"""Cross-replica batch norm in two processes against torch's on the whole batch."""

import forked
import pytest
import torch
import torch.distributed as dist
from torch import nn

from training.batchnorm import CrossReplicaBatchNorm, convert_batch_norm

CPU = torch.device("cpu")


def norm(kind, dtype=torch.float64):
    torch.manual_seed(0)
    layer = kind(3)
    nn.init.uniform_(layer.weight, 0.5, 2), nn.init.normal_(layer.bias)
    return layer.to(dtype)


def on_a_share(kind, x, weights):
    """Forward and backward on this rank's half; two steps, so that buffers move twice."""
    layer = convert_batch_norm(nn.Sequential(norm(kind)), CPU)
    assert isinstance(layer[0], CrossReplicaBatchNorm)
    mine = x.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_(True)
    w = weights.chunk(dist.get_world_size())[dist.get_rank()]
    for _ in range(2):
        y = layer(mine)
    (y * w).sum().backward()
    grads = torch.stack([layer[0].weight.grad, layer[0].bias.grad])
    return y.detach(), mine.grad, grads, [b.clone() for b in layer[0].buffers()]


@pytest.mark.parametrize("kind, shape", [(nn.BatchNorm2d, (8, 3, 2, 2)), (nn.BatchNorm1d, (6, 3))])
def test_two_processes_are_one_batch(kind, shape):
    torch.manual_seed(1)
    x = 2 * torch.randn(shape, dtype=torch.float64) + 5
    weights = torch.randn(shape, dtype=torch.float64)
    layer, whole = norm(kind), x.clone().requires_grad_(True)
    for _ in range(2):
        y = layer(whole)
    (y * weights).sum().backward()

    first, second = forked.run(on_a_share, kind, x, weights, ranks=2)
    exact = dict(rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), y.detach(), **exact)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), whole.grad, **exact)
    expected = torch.stack([layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(first[2] + second[2], expected, **exact)
    for mine, theirs, reference in zip(first[3], second[3], layer.buffers(), strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, reference, **exact)


def without_scale(x, dtype):
    plain = nn.BatchNorm2d(3, affine=False).to(dtype)
    layer = convert_batch_norm(nn.Sequential(plain), CPU)[0]
    mine = x.to(dtype).chunk(2)[dist.get_rank()].requires_grad_(True)
    for scale in (1, 2):
        y = layer(scale * mine)
    y.square().sum().backward()
    return y.detach(), layer.running_mean, layer.running_var


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_scale_and_offset(dtype):
    torch.manual_seed(3)
    x, reference = torch.randn(8, 3, 2, 2), nn.BatchNorm2d(3, affine=False).to(dtype)
    for scale in (1, 2):
        y = reference(scale * x.to(dtype))
    outputs = forked.run(without_scale, x, dtype, ranks=2)
    torch.testing.assert_close(torch.cat([o[0] for o in outputs]), y)
    for found in outputs:
        torch.testing.assert_close(found[1], reference.running_mean)
        torch.testing.assert_close(found[2], reference.running_var)


def low_precision(x, dtype):
    layer = convert_batch_norm(nn.Sequential(norm(nn.BatchNorm2d, torch.float32)), CPU)[0]
    y = layer(x.to(dtype).chunk(2)[dist.get_rank()])
    return y.detach(), layer.running_mean, layer.running_var


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_has_float32_statistics(dtype):
    torch.manual_seed(2)
    x = torch.randn(64, 3, 8, 8) + 3  # summed in bf16, the mean would be off by percents
    reference = norm(nn.BatchNorm2d, torch.float64)
    y = reference(x.to(dtype).double())
    outputs = forked.run(low_precision, x, dtype, ranks=2)
    assert outputs[0][0].dtype == dtype
    found = torch.cat([o[0] for o in outputs]).double()
    torch.testing.assert_close(found, y.detach(), rtol=1e-2, atol=1e-2)
    for buffer, expected in zip(outputs[0][1:], reference.buffers(), strict=False):
        assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer.double(), expected, rtol=1e-5, atol=1e-5)


def evaluate(x):
    layer = convert_batch_norm(nn.Sequential(norm(nn.BatchNorm2d)), CPU)[0]
    layer.running_mean += 1
    return layer.eval()(x[dist.get_rank() :]).detach(), layer.running_mean


def test_eval_mode_uses_the_running_statistics_of_each_process_alone():
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    reference = norm(nn.BatchNorm2d)
    reference.running_mean += 1
    expected = reference.eval()(x).detach()
    first, second = forked.run(evaluate, x, ranks=2)
    torch.testing.assert_close(first[0], expected)
    torch.testing.assert_close(second[0], expected[1:])
    assert torch.equal(first[1], reference.running_mean)


def test_conversion_keeps_names_tensors_and_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, momentum=0.3)))
    model[1].eval()
    model[1][0].weight.requires_grad_(False)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    converted = convert_batch_norm(model, CPU)
    after = dict(converted.named_parameters()) | dict(converted.named_buffers())
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    layer = converted[1][0]
    assert layer.momentum == 0.3 and not layer.training and not layer.weight.requires_grad


def test_without_a_group_it_is_torchs():
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    layer = convert_batch_norm(nn.Sequential(norm(nn.BatchNorm2d)), CPU)
    assert torch.equal(layer(x), norm(nn.BatchNorm2d)(x))
