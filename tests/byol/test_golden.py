"""Thirty steps against a second BYOL, written here from the paper in the plainest way.

Float64, loss by loss to 1e-9.  It shares no code with ours; of ours it takes the initial weights,
the order of the images and the numbers drawn for the views.  Everything that is computed from them
is written out below: image by image, parameter by parameter.
"""

import colorsys
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from byol.byol import BYOL
from data.images import Images
from data.loader import VIEWS, Loader, generator
from data.views import View2Config, ViewConfig, draw
from training.encoder import Encoder
from training.loop import Precision, train_steps
from training.optimizers import build_optimizer

STEPS, WARMUP, BATCH, SIZE, SEED = 30, 4, 6, 24, 5
PEAK, DECAY, MOMENTUM, BASE_TAU = 1.5, 1e-3, 0.9, 0.9
MEAN, STD = [0.4, 0.45, 0.5], [0.2, 0.25, 0.3]
PICTURES = np.random.default_rng(0).integers(0, 256, (21, 3, 30, 26), np.uint8)


def new_loader() -> Loader:
    return Loader(images=Images([PICTURES]), labels=None, views=(ViewConfig(), View2Config()),
                  crop_size=SIZE, batch_size=BATCH, mean=MEAN, std=STD, seed=SEED,
                  dtype=torch.float64)  # fmt: skip


def view(image, drawn, i):
    """One view of one image, by torchvision's operations in the paper's order."""
    x = torch.from_numpy(image).double() / 255
    box = [int(drawn[k][i]) for k in ("top", "left", "h", "w")]
    x = tv.resized_crop(x, *box, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True)
    x = x.clamp(0, 1)
    if drawn["flip"][i]:
        x = tv.horizontal_flip(x)
    if drawn["jitter"][i]:
        for operation in drawn["order"][i]:
            name = ["brightness", "contrast", "saturation", "hue"][operation]
            adjust = adjust_hue if name == "hue" else getattr(tv, f"adjust_{name}")
            x = adjust(x, float(drawn[name][i]))
    if drawn["grey"][i]:
        x = tv.rgb_to_grayscale(x, num_output_channels=3)
    if drawn["blur"][i]:
        x = tv.gaussian_blur(x, [3, 3], [float(drawn["sigma"][i])] * 2)
    if drawn["solarize"][i]:
        x = tv.solarize(x, 0.5)
    return torch.stack([(x[c] - MEAN[c]) / STD[c] for c in range(3)])


def adjust_hue(x, turn):
    """torchvision's works in float32 inside; Python's own, pixel by pixel, does not."""
    pixels = x.flatten(1).T.tolist()
    for n, (red, green, blue) in enumerate(pixels):
        h, s, v = colorsys.rgb_to_hsv(red, green, blue)
        pixels[n] = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
    return torch.tensor(pixels, dtype=x.dtype).T.reshape(x.shape).clamp(0, 1)


def batch_norm(x, p, name):
    axes = (0, 2, 3) if x.ndim == 4 else (0,)
    mean = x.mean(axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(axes, keepdim=True)
    shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
    x = (x - mean) / torch.sqrt(variance + 1e-5)
    return x * p[f"{name}.weight"].view(shape) + p[f"{name}.bias"].view(shape)


def relu(x):
    return torch.where(x > 0, x, 0)


def resnet(x, p, name):
    x = relu(batch_norm(conv2d(x, p[f"{name}.conv1.weight"], stride=2, padding=1), p,
                        f"{name}.bn1"))  # fmt: skip
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            here = f"{name}.layer{layer}.{block}"
            stride = 2 if layer > 1 and block == 0 else 1
            y = conv2d(x, p[f"{here}.conv1.weight"], stride=stride, padding=1)
            y = relu(batch_norm(y, p, f"{here}.bn1"))
            y = conv2d(y, p[f"{here}.conv2.weight"], padding=1)
            y = batch_norm(y, p, f"{here}.bn2")
            if stride == 2:
                x = conv2d(x, p[f"{here}.downsample.0.weight"], stride=2)
                x = batch_norm(x, p, f"{here}.downsample.1")
            x = relu(x + y)
    return x.mean((2, 3))


def head(x, p, name):
    x = x @ p[f"{name}.0.weight"].T + p[f"{name}.0.bias"]
    return relu(batch_norm(x, p, f"{name}.1")) @ p[f"{name}.3.weight"].T


def distance(q, z):
    total = 0
    for a, b in zip(q, z, strict=True):
        a, b = a / torch.sqrt((a**2).sum()), b / torch.sqrt((b**2).sum())
        total = total + ((a - b) ** 2).sum()
    return total / len(q)


def naive(start: dict, loader: Loader):
    """Losses and final weights; `start` is the state dict that ours starts with."""
    p = {k: v.clone() for k, v in start.items() if "running" not in k and "num_batches" not in k}
    online = [k for k in p if not k.startswith("target_")]
    for k in online:
        p[k].requires_grad_(True)
    velocity, losses = {k: 0.0 for k in online}, []
    for step in range(STEPS):
        rng = generator(SEED, VIEWS, step)
        chosen = loader.indices(step)
        v1, v2 = (
            torch.stack([view(PICTURES[n], drawn, i) for i, n in enumerate(chosen)])
            for drawn in [draw(v, BATCH, 30, 26, rng) for v in (ViewConfig(), View2Config())]
        )
        q1, q2 = (
            head(head(resnet(v, p, "encoder"), p, "projector"), p, "predictor") for v in (v1, v2)
        )
        with torch.no_grad():
            z1, z2 = (head(resnet(v, p, "target_encoder"), p, "target_projector") for v in (v1, v2))
        loss = distance(q1, z2) + distance(q2, z1)
        gradients = torch.autograd.grad(loss, [p[k] for k in online])
        losses.append(loss.item())

        if step < WARMUP:
            rate = PEAK * step / WARMUP
        else:
            rate = PEAK * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        tau = 1 - (1 - BASE_TAU) * (math.cos(math.pi * step / STEPS) + 1) / 2
        for k, g in zip(online, gradients, strict=True):
            w = p[k].detach()
            if w.ndim > 1:
                g = g + DECAY * w
                g = g * 1e-3 * math.sqrt((w**2).sum()) / math.sqrt((g**2).sum())
            velocity[k] = MOMENTUM * velocity[k] + g
            p[k] = (w - rate * velocity[k]).requires_grad_(True)
        for k in p:
            if k.startswith("target_"):
                p[k] = tau * p[k] + (1 - tau) * p[k.removeprefix("target_")].detach()
    return losses, p


@pytest.fixture(scope="module")
def both():
    torch.manual_seed(0)
    config = BYOL.Config(base_tau=BASE_TAU, hidden=16, projection=8)
    method = BYOL(Encoder("resnet18", "small", 1 / 16), config).double()
    start = {k: v.clone() for k, v in method.state_dict().items()}
    optimizer = build_optimizer("lars", method.parameter_groups(DECAY), MOMENTUM)
    precision = Precision("fp32", torch.device("cpu"))
    steps = train_steps(method, new_loader(), optimizer, precision, peak=PEAK, warmup=WARMUP,
                        total=STEPS)  # fmt: skip
    losses = [step.loss.item() for step in steps]
    return start, losses, method.state_dict(), *naive(start, new_loader())


def test_every_loss_agrees(both):
    _, ours, _, theirs, _ = both
    assert ours == pytest.approx(theirs, rel=0, abs=1e-9)


def test_all_weights_agree_at_the_end(both):
    _, _, ours, _, theirs = both
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=0, atol=1e-9, msg=name)


def test_the_run_is_worth_comparing(both):
    """It moves far enough that a wrong rate, decay or average would show."""
    start, losses, end, _, _ = both
    assert losses[0] == pytest.approx(4, abs=1.2) and len(set(losses)) == STEPS
    for part in ("encoder", "target_encoder", "predictor"):
        name = f"{part}.0.weight" if part == "predictor" else f"{part}.layer4.1.conv2.weight"
        moved = (end[name] - start[name]).norm() / start[name].norm()
        assert moved > 1e-3, name
