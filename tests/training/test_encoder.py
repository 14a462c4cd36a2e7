"""The encoder against torchvision's ResNet; heads and stems against the specification."""

import pytest
import torch
import torchvision
from torch import nn

from training.encoder import ARCHS, CenterTapConv2d, Encoder


@pytest.mark.parametrize("arch", ARCHS)
def test_encoder_has_torchvisions_names_and_shapes(arch):
    with torch.device("meta"):  # shapes alone
        theirs = getattr(torchvision.models, arch)().state_dict()
        ours = Encoder(arch).state_dict()
    theirs = {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}
    assert {k: v.shape for k, v in ours.items()} == theirs


def test_encoder_computes_what_torchvisions_does():
    theirs, encoder = torchvision.models.resnet18(), Encoder("resnet18")
    for buffer in (b for b in theirs.buffers() if b.is_floating_point()):
        buffer.uniform_(0.5, 2)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    encoder.load_state_dict(state)
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder.eval()(x), theirs.eval()(x))
    assert encoder.feature_size == 512


def test_maps_of_one_pixel_skip_taps_that_meet_zeros_only():
    """Value and every gradient in float64; the skipped taps have a gradient of 0 in both."""
    theirs, encoder = (n.double() for n in (torchvision.models.resnet18(), Encoder("resnet18")))
    encoder.load_state_dict({k: v for k, v in theirs.state_dict().items() if k[:3] != "fc."})
    theirs.fc, x = nn.Identity(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    seen = []
    encoder.layer4[1].conv1.register_forward_hook(lambda module, x, y: seen.append(y.shape))
    for network in (theirs, encoder):
        network(x).square().sum().backward()
    assert seen == [(4, 512, 1, 1)]
    gradients = dict(encoder.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-9, atol=1e-9)


def test_no_gradient_of_a_small_map_comes_from_memory_that_nobody_wrote():
    """In bfloat16 on a CPU, after other tensors left their bytes behind."""
    torch.manual_seed(0)
    encoder, x = Encoder("resnet18", "small", 1 / 16), torch.randn(64, 3, 8, 8)
    seen = []
    encoder.layer4[0].conv1.register_forward_hook(lambda module, x, y: seen.append(x[0].shape))
    gradients = []
    for enabled in (False, *[True] * 20):
        for size in (100, 1000, 10000, 100000):
            torch.full((size,), float("nan"))
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = encoder(x)
        y.float().square().sum().backward()
        gradients.append(encoder.layer4[0].conv1.weight.grad.clone())
    assert seen[0] == (64, 16, 1, 1)
    exact, *rounded = gradients
    assert ((rounded[0] - exact).norm() / exact.norm()).item() < 0.5  # 0.13 was measured
    assert all(torch.equal(found, rounded[0]) for found in rounded)


SMALL_MAPS = [  # kernel, stride, groups
    (3, 2, 32),
    (5, 2, 32),
    (7, 2, 2),
    ((1, 7), 2, 1),
]


@pytest.mark.parametrize("kernel, stride, groups", SMALL_MAPS)
def test_grouped_and_large_convolutions_of_one_pixel(kernel, stride, groups):
    """Value and gradients of torch's own in float64; in bfloat16 no memory that nobody wrote."""
    torch.manual_seed(0)
    padding = tuple(k // 2 for k in (kernel if isinstance(kernel, tuple) else (kernel, kernel)))
    theirs = nn.Conv2d(32, 32, kernel, stride, padding, groups=groups).double()
    ours, x = CenterTapConv2d(theirs), torch.randn(64, 32, 1, 1, dtype=torch.float64)
    results = []
    for layer in (theirs, ours):
        layer.zero_grad()
        layer(x).square().sum().backward()
        results.append([layer(x), layer.weight.grad.clone(), layer.bias.grad.clone()])
    torch.testing.assert_close(*results)
    ours.float().to(memory_format=torch.channels_last)
    gradients = []
    for _ in range(20):
        for size in (100, 1000, 10000, 100000):
            torch.full((size,), float("nan"))
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(x.float())
        y.float().square().sum().backward()
        gradients.append(ours.weight.grad.clone())
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    torch.testing.assert_close(gradients[0].double(), results[0][1], rtol=0.1, atol=1)


@pytest.mark.parametrize(
    "stem, side", [("imagenet", 24), ("stl", 48), ("cifar", 96), ("small", 48)]
)
def test_stems_reduce_as_they_say(stem, side):
    encoder, seen = Encoder("resnet18", stem, 1 / 16), []
    encoder.layer1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    encoder.eval()(torch.randn(1, 3, 96, 96))
    assert seen[0][1:] == (4, side, side)


@pytest.mark.parametrize(
    "arch, width, size",
    [("resnet18", 0.5, 256), ("resnet50", 0.125, 256), ("resnext50_32x4d", 0.25, 512)],
)
def test_width_scales_every_channel_count(arch, width, size):
    encoder = Encoder(arch, "cifar", width)
    assert encoder.feature_size == size
    assert encoder.eval()(torch.randn(2, 3, 8, 8)).shape == (2, size)
    with torch.device("meta"):
        full = {k: v.shape for k, v in Encoder(arch, "cifar").state_dict().items()}
    for name, value in encoder.state_dict().items():
        if value.ndim:
            assert value.shape[0] == full[name][0] * width, name


@pytest.mark.parametrize("zero_init", [False, True])
@pytest.mark.parametrize("arch, last", [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_is_the_last_scale_of_each_block(zero_init, arch, last):
    encoder = Encoder(arch, "small", 1 / 16, zero_init)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            zero = zero_init and name.endswith(last) and name.startswith("layer")
            assert (module.weight == (0 if zero else 1)).all(), name


def test_convolutions_start_as_torchvisions():
    torch.manual_seed(0)
    encoder = Encoder("resnet18", "stl", 0.5)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
