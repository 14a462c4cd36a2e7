"""The picture of the augmentation shows what the views do."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from data import preview
from data.preview import extremes, mosaic
from data.views import View2Config, ViewConfig


@pytest.fixture
def pixels():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 40, 40), np.uint8))


def test_each_operation_stands_alone_at_its_ends(pixels):
    found = extremes(pixels, [ViewConfig(), View2Config()], 40)
    assert list(found) == [
        "crop 8 %", "crop 100 %", "aspect 0.75", "aspect 1.3", "flip", "brightness 0.6",
        "brightness 1.4", "contrast 0.6", "contrast 1.4", "saturation 0.8", "saturation 1.2",
        "hue -0.1", "hue 0.1", "grey",
        "blur 0.1 px", "blur 2 px", "solarize",
    ]  # fmt: skip
    x = pixels.float() / 255
    small = F.resized_crop(x, 14, 14, 11, 11, [40, 40], F.InterpolationMode.BICUBIC, antialias=True)
    expected = {
        "crop 8 %": small.clamp(0, 1),
        "crop 100 %": x,
        "flip": x.flip(3),
        "brightness 1.4": F.adjust_brightness(x, 1.4),
        "contrast 0.6": F.adjust_contrast(x, 0.6),
        "saturation 1.2": F.adjust_saturation(x, 1.2),
        "hue 0.1": F.adjust_hue(x, 0.1),
        "grey": F.rgb_to_grayscale(x, 3),
        "blur 2 px": F.gaussian_blur(x, [5, 5], [2.0, 2.0]),
        "solarize": F.solarize(x, 0.5),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-3, msg=name)


def test_what_a_recipe_never_draws_is_not_shown(pixels):
    view = ViewConfig(
        area=[1.0, 1.0], aspect=[1.0, 1.0], jitter_p=0.0, grey_p=0.0, blur_p=0.0, flip_p=0.0
    )
    assert list(extremes(pixels, [view], 40)) == ["crop 100 %"]


def test_tiles_lie_where_they_should():
    red, blue = (torch.tensor(c).view(3, 1, 1).expand(3, 2, 2) for c in ([1.0, 0, 0], [0, 0, 1.0]))
    found = np.asarray(mosaic([[red, blue], [blue]], ["a", "b"], side=10))
    assert found.shape == (20 + 2 * 14 + 4, 2 * 14 + 4, 3)
    assert found[25, 5].tolist() == [255, 0, 0] and found[25, 19].tolist() == [0, 0, 255]
    assert found[39, 5].tolist() == [0, 0, 255] and found[39, 19].tolist() == [255, 255, 255]


def test_the_command_writes_a_picture_once(sample, recipe, tmp_path, capsys):
    out = tmp_path / "preview.png"
    flags = ["--recipe", recipe, "--out", str(out), "--quiet", "--count", "3"]
    columns = preview.main(flags)["columns"]
    assert columns[:4] == ["original", "view1", "view2", "crop 8 %"]
    with Image.open(out) as picture:
        assert picture.size == (len(columns) * 100 + 4, 3 * 100 + 24)
    before = out.read_bytes()
    with pytest.raises(SystemExit) as stop:
        preview.main(flags)
    assert stop.value.code == 2 and out.read_bytes() == before
    assert str(out) in capsys.readouterr().err
