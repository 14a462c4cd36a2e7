"""Against torchvision.transforms.v2.functional, image by image, on the same drawn numbers."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from core.errors import UserError
from data.transform import frame
from data.views import View2Config, ViewConfig, apply, blur, draw, normalize

TAPS = {96: 9, 64: 7, 48: 5, 32: 3, 28: 3, 224: 23}  # the specification's 2 * int(size / 20) + 1
CLOSE = dict(atol=1e-5, rtol=0)


def photographs(count, height, width, seed=0):
    """Noise of all scales, with gray, black, white and saturated images among it."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    smooth = torch.from_numpy(rng.integers(0, 256, (count, 3, 4, 5))).float()
    smooth = torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear")
    images[::2] = smooth[::2].numpy().astype(np.uint8)
    images[1, 1:] = images[1, :1]  # gray: its hue is undefined
    images[2], images[3] = 0, 255
    images[4, 1:] = 0  # pure red
    return torch.from_numpy(images)


def reference(image, view, drawn, n, size):
    """The view of one uint8 image by torchvision, one operation after another."""
    p = {name: values[n].item() for name, values in drawn.items() if name != "order"}
    x = F.resized_crop(image.float() / 255, p["top"], p["left"], p["h"], p["w"], [size, size],
                       F.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)  # fmt: skip
    if p["flip"]:
        x = F.horizontal_flip(x)
    if p["jitter"]:
        operations = [
            lambda x: F.adjust_brightness(x, p["brightness"]),
            lambda x: F.adjust_contrast(x, p["contrast"]),
            lambda x: F.adjust_saturation(x, p["saturation"]),
            lambda x: F.adjust_hue(x, p["hue"]),
        ]
        for index in drawn["order"][n]:
            x = operations[index](x)
    if p["grey"]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if p["blur"]:
        x = F.gaussian_blur(x, [TAPS[size]] * 2, [p["sigma"]] * 2)
    return F.solarize(x, 0.5) if p["solarize"] else x


def off(**on):
    """A view of the whole frame whose operations are all off but these."""
    settings = dict(area=[1.0, 1.0], aspect=[1.0, 1.0], flip_p=0.0, jitter_p=0.0, grey_p=0.0,
                    blur_p=0.0, solarize_p=0.0)  # fmt: skip
    return ViewConfig(**(settings | on))


def only(name):
    strengths = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    return off(jitter_p=1.0, **(strengths | {name: 0.5}))


OPERATIONS = {
    "nothing": off(),
    "crop": off(area=[0.05, 1.0], aspect=[0.5, 2.0]),
    "flip": off(flip_p=0.5),
    "crop and flip": off(area=[0.08, 1.0], aspect=[0.75, 4 / 3], flip_p=0.5),
    "brightness": only("brightness"),
    "contrast": only("contrast"),
    "saturation": only("saturation"),
    "hue": only("hue"),
    "jitter": off(jitter_p=0.7, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5),
    "grey": off(grey_p=0.5),
    "blur": off(blur_p=0.7),
    "solarize": off(solarize_p=0.5),
    "view 1": ViewConfig(),
    "view 2": View2Config(blur_p=0.5, solarize_p=0.5, grey_p=0.5),
}


@pytest.mark.parametrize("shape, size", [((96, 96), 96), ((96, 96), 48), ((28, 28), 28),
                                         ((50, 70), 64)])  # fmt: skip
@pytest.mark.parametrize("name", OPERATIONS)
def test_equal_to_torchvision(name, shape, size):
    view, count = OPERATIONS[name], 16
    images = photographs(count, *shape)
    drawn = draw(view, count, *shape, np.random.default_rng(3))
    got = apply(images, drawn, size)
    assert got.shape == (count, 3, size, size) and got.dtype == torch.float32
    for n in range(count):
        torch.testing.assert_close(got[n], reference(images[n], view, drawn, n, size), **CLOSE)


def test_each_operation_changes_the_image():
    """Otherwise the comparison above would prove nothing."""
    images = photographs(16, 48, 48)
    plain = apply(images, draw(off(), 16, 48, 48, np.random.default_rng(0)), 48)
    for name in set(OPERATIONS) - {"nothing"}:
        view = OPERATIONS[name]
        got = apply(images, draw(view, 16, 48, 48, np.random.default_rng(3)), 48)
        assert (got - plain).abs().max() > 0.05, name


@pytest.mark.parametrize("top, left, h, w", [(0, 0, 1, 1), (95, 95, 1, 1), (0, 90, 96, 6),
                                             (13, 0, 3, 96), (1, 2, 95, 94)])  # fmt: skip
def test_extreme_crops(top, left, h, w):
    images = photographs(6, 96, 96)
    drawn = draw(off(), 6, 96, 96, np.random.default_rng(0))
    for key, value in dict(top=top, left=left, h=h, w=w).items():
        drawn[key][:] = value
    got = apply(images, drawn, 48)
    for n in range(6):
        torch.testing.assert_close(got[n], reference(images[n], off(), drawn, n, 48), **CLOSE)


@pytest.mark.parametrize("size, taps", [(224, 23), (64, 7), (32, 3)])
def test_taps_of_the_blur(size, taps):
    point = torch.zeros(1, 3, size, size)
    point[:, :, size // 2, size // 2] = 1
    blurred = blur(point, torch.full((1,), 1.5))
    assert int((blurred[0, 0, size // 2] > 0).sum()) == taps == TAPS[size]


def test_values_stay_in_range_and_the_source_is_untouched():
    images = photographs(16, 32, 32)
    before = images.clone()
    view = View2Config(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, solarize_p=0.5)
    for seed in range(3):
        got = apply(images, draw(view, 16, 32, 32, np.random.default_rng(seed)), 32)
        assert got.min() >= 0 and got.max() <= 1 + 1e-6 and torch.isfinite(got).all()
    assert torch.equal(images, before)


def test_double_precision_agrees():
    images, view = photographs(16, 32, 32), View2Config()
    drawn = draw(view, 16, 32, 32, np.random.default_rng(1))
    single, double = (apply(images, drawn, 32, d) for d in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, **CLOSE)


def test_a_batch_is_the_same_as_its_images_alone():
    images, view = photographs(8, 32, 32), View2Config()
    drawn = draw(view, 8, 32, 32, np.random.default_rng(2))
    whole = apply(images, drawn, 32)
    for n in range(8):
        alone = {name: values[n : n + 1] for name, values in drawn.items()}
        torch.testing.assert_close(apply(images[n : n + 1], alone, 32)[0], whole[n], **CLOSE)


def test_normalize_comes_last_and_is_per_channel():
    x = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.4, 0.2])
    expected = F.normalize(x, mean.tolist(), std.tolist())
    got = normalize(x.clone(), mean, std)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert got.is_contiguous(memory_format=torch.channels_last)


# What is drawn


def many(view=None, count=20_000, height=1000, width=1000, seed=0):
    return draw(view or ViewConfig(), count, height, width, np.random.default_rng(seed))


def assert_uniform(values, low, high):
    """The largest gap of the distribution functions, at its 1e-6 quantile (Kolmogorov)."""
    values = (np.sort(values) - low) / (high - low)
    assert values[0] >= 0 and values[-1] <= 1
    gap = np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max()
    assert gap < 2.7 / np.sqrt(len(values))


def test_crops_have_uniform_area_and_log_uniform_aspect():
    view = ViewConfig(area=[0.08, 0.5])  # no side reaches the image's, so nothing is clipped
    drawn = many(view, height=20_000, width=20_000)
    assert_uniform(drawn["h"] * drawn["w"] / 20_000**2, 0.0799, 0.5001)
    assert_uniform(np.log(drawn["w"] / drawn["h"]), np.log(0.7499), np.log(4.0001 / 3))


def test_crops_have_the_aspect_in_pixels_on_oblong_images():
    drawn = many(ViewConfig(area=[0.1, 0.1], aspect=[1.0, 1.0]), height=500, width=2000)
    side = round(np.sqrt(0.1 * 500 * 2000))
    assert (drawn["h"] == side).all() and (drawn["w"] == side).all()


def test_crops_lie_inside_at_a_uniform_place():
    drawn = many(ViewConfig(area=[0.25, 0.25], aspect=[1.0, 1.0]), height=6, width=8)
    assert set(drawn["h"]) == set(drawn["w"]) == {3}
    for name, places in (("top", 4), ("left", 6)):
        counts = np.bincount(drawn[name])
        assert len(counts) == places
        assert np.abs(counts - 20_000 / places).max() < 6 * np.sqrt(20_000 / places)
    assert abs(np.corrcoef(drawn["top"], drawn["left"])[0, 1]) < 0.04


def test_crops_are_clipped_to_the_image():
    drawn = many(height=28, width=28)
    assert drawn["h"].max() == drawn["w"].max() == 28 and drawn["h"].min() >= 1
    assert (drawn["top"] >= 0).all() and (drawn["top"] + drawn["h"] <= 28).all()
    assert (drawn["left"] >= 0).all() and (drawn["left"] + drawn["w"] <= 28).all()
    # drawn once and clipped, not redrawn: one side is often the image's while the other is less
    assert ((drawn["h"] == 28) != (drawn["w"] == 28)).mean() > 0.05


@pytest.mark.parametrize(
    "view, expected",
    [
        (ViewConfig(), dict(flip=0.5, jitter=0.8, grey=0.2, blur=1.0, solarize=0.0)),
        (View2Config(), dict(flip=0.5, jitter=0.8, grey=0.2, blur=0.1, solarize=0.2)),
    ],
)
def test_probabilities_are_those_of_the_paper(view, expected):
    drawn = many(view)
    for name, p in expected.items():
        assert abs(drawn[name].mean() - p) <= 5 * np.sqrt(p * (1 - p) / 20_000), name
    chosen = [drawn[name] for name, p in expected.items() if 0 < p < 1]
    correlation = np.corrcoef(np.array(chosen, float)) - np.eye(len(chosen))
    assert np.abs(correlation).max() < 0.04  # each is drawn for itself


def test_factors_are_uniform_in_their_ranges():
    drawn = many()
    for name, strength in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
        assert_uniform(drawn[name], 1 - strength, 1 + strength)
    assert_uniform(drawn["hue"], -0.1, 0.1)
    assert_uniform(drawn["sigma"], 0.1, 2.0)


def test_all_orders_of_the_jitter_are_equally_likely():
    orders, counts = np.unique(many()["order"], axis=0, return_counts=True)
    assert len(orders) == 24 and (np.sort(orders, axis=1) == np.arange(4)).all()
    expected = 20_000 / 24
    assert ((counts - expected) ** 2 / expected).sum() < 70  # chi-square, 23 degrees: p < 1e-6


def test_each_image_of_a_batch_gets_its_own_numbers():
    drawn = many(count=64, height=96, width=96)
    for name in ("brightness", "contrast", "saturation", "hue", "sigma"):
        assert len(np.unique(drawn[name])) == 64, name
    for name in ("flip", "jitter", "grey", "solarize"):
        assert len(np.unique(many(View2Config(), count=64)[name])) == 2, name
    boxes = np.stack([drawn[name] for name in ("top", "left", "h", "w")], 1)
    assert len(np.unique(boxes, axis=0)) > 60
    assert np.ptp(drawn["h"] * drawn["w"]) > 0.6 * 96 * 96
    assert np.ptp(np.log(drawn["h"] / drawn["w"])) > 0.4
    assert all(len(values) == 64 for values in drawn.values())


def test_equal_seeds_draw_equal_numbers_and_others_do_not():
    first, again, other = many(count=50), many(count=50), many(count=50, seed=1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["brightness"], other["brightness"])


def test_a_switched_off_operation_leaves_the_other_numbers_alone():
    """So that two runs which differ in one setting see the same crops."""
    with_blur, without = many(count=50), many(ViewConfig(blur_p=0.0, flip_p=0.0), count=50)
    for name in ("top", "left", "h", "w", "brightness", "order", "sigma"):
        assert np.array_equal(with_blur[name], without[name])


def test_supervised_views_are_crop_shift_and_flip():
    view = ViewConfig.supervised([0.3, 1.0], 0, 0.5)
    drawn = many(view, count=2000)
    assert not any(drawn[name].any() for name in ("jitter", "grey", "blur", "solarize"))
    assert 0.4 < drawn["flip"].mean() < 0.6


def test_a_shift_is_a_crop_from_a_zero_border():
    """The usual random crop of a padded image, by slicing."""
    square = photographs(40, 20, 20)
    view = ViewConfig.supervised([1.0, 1.0], 3, 0.0)
    drawn = draw(view, 40, 20, 20, np.random.default_rng(0))
    assert set(drawn["top"]) == set(drawn["left"]) == set(range(-3, 4))
    assert set(drawn["h"]) == set(drawn["w"]) == {20}
    padded = torch.nn.functional.pad(square.float() / 255, (3, 3, 3, 3))
    found = apply(square, drawn, 20)
    for x, image, top, left in zip(found, padded, drawn["top"], drawn["left"], strict=True):
        expected = image[:, top + 3 : top + 23, left + 3 : left + 23]
        torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name, pair", [("area", [1.0, 0.5]), ("aspect", [1.0]),
                                        ("blur_sigma", [0.1, 0.2, 0.3])])  # fmt: skip
def test_pairs_are_checked(name, pair):
    with pytest.raises(UserError, match=f"view1.{name}"):
        ViewConfig(**{name: pair}).check("view1")
    ViewConfig().check("view1")


# The evaluation geometry


@pytest.mark.parametrize("shape", [(96, 96), (300, 100), (100, 300), (333, 500), (60, 77)])
@pytest.mark.parametrize("size, crop", [(57, 50), (110, 96), (183, 160), (64, 64), (0, 48)])
def test_frame_is_resize_and_centre_crop(shape, size, crop):
    images = photographs(5, *shape)
    expected = images.float() / 255
    if size:
        mode = F.InterpolationMode.BICUBIC
        expected = F.resize(expected, [size], mode, antialias=True).clamp(0, 1)
    expected = F.center_crop(expected, [crop, crop])
    torch.testing.assert_close(frame(images, size, crop), expected, **CLOSE)


def test_frame_without_sizes_is_the_image():
    images = photographs(5, 28, 30)
    assert torch.equal(frame(images, 0, 0), images.float() / 255)
