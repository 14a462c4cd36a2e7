"""Frozen features: order, processes, mode; and the raw-pixel control."""

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist

from data.datasets import DataConfig, Dataset
from data.images import Images
from data.labelled import Labelled
from data.transform import EvalTransform
from eval import features
from eval.features import extract
from eval.trained import Features
from reproduce import pixels
from training.distributed import Processes
from training.encoder import Encoder

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
TRANSFORM = EvalTransform(MEAN, STD)


def images(count=23, channels=3, side=8) -> Images:
    rng = np.random.default_rng(0)
    return Images([rng.integers(0, 256, (count, channels, side, side), np.uint8)])


def encoder() -> Encoder:
    torch.manual_seed(0)
    network = Encoder("resnet18", "small", 1 / 16)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return network


def by_hand(pictures: Images) -> torch.Tensor:
    """Features of one image at a time, in eval mode."""
    network, rows = encoder().eval(), []
    for pixel in pictures.parts[0]:
        x = (pixel.astype(np.float64) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(
            STD, (3, 1, 1)
        )
        rows.append(network(torch.from_numpy(x).float()[None])[0])
    expected = torch.stack(rows).detach()
    assert (expected.std(0) > 1e-3).sum() > 10  # or the comparisons would hold for anything
    return expected


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_features_are_in_order_whatever_the_batch(batch_size, monkeypatch):
    monkeypatch.setattr(features, "BATCH", batch_size)
    found = extract(encoder(), images(), TRANSFORM)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, by_hand(images()), rtol=1e-4, atol=1e-5)


def on_ranks(count, batch_size):
    features.BATCH = batch_size
    processes = Processes(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    return extract(encoder(), images(count), TRANSFORM, processes)


@pytest.mark.parametrize("count, batch_size", [(23, 5), (24, 12), (3, 5)])
def test_two_processes_compute_the_same_as_one(count, batch_size):
    first, second = forked.run(on_ranks, count, batch_size, ranks=2)
    assert torch.equal(first, second) and len(first) == count
    torch.testing.assert_close(first, by_hand(images(count)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_statistics_are_left_as_they_were(training):
    network = encoder().train(training)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    extract(network, images(), TRANSFORM)
    assert all(module.training is training for module in network.modules())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_evaluation_geometry_is_used():
    seen = []
    network = encoder()
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    extract(network, images(3, side=40), EvalTransform(MEAN, STD, 20, 16))
    assert seen == [(3, 3, 16, 16)]


def test_features_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert extract(encoder(), images(), TRANSFORM).dtype == torch.float32


def test_pixels_are_values_in_0_to_1_and_grey_ones_come_once():
    colour = images(4, 3, 8)
    expected = torch.from_numpy(colour.parts[0].astype(np.float32) / 255).flatten(1)
    torch.testing.assert_close(pixels(colour), expected)
    assert pixels(images(4, 1, 8)).shape == (4, 64)
    assert pixels(images(4, 3, 48)).shape == (4, 3 * 32 * 32)


def test_features_are_computed_once_for_each_set_of_images():
    train, test, labels, computed = images(20), images(6), np.zeros(20, np.int64), []

    def first_values(images):
        computed.append(images)
        return images.take(np.arange(len(images))).flatten(1)[:, 0]

    known = Features(first_values, Dataset(train, labels, None, test, labels[:6], ["a"]))
    everything = Labelled(train, labels, np.arange(20), ["a"])
    for rows in (np.arange(3, 9), np.arange(19, 0, -2)):
        expected = torch.from_numpy(train.parts[0][rows, 0, 0, 0])
        assert torch.equal(known(everything.part(rows)), expected)
        known(Labelled(test, labels[:6], None, ["a"]))
    assert computed == [train, test]


def test_a_transform_says_what_it_does_with_an_image():
    assert str(EvalTransform.of(DataConfig(crop_size=96), (160, 160), MEAN, STD)) == (
        "resized to 110 pixels, center crop of 96"
    )
    assert str(EvalTransform.of(DataConfig(), (96, 96), MEAN, STD)) == "not resized, not cropped"
