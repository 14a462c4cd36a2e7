"""The picture of the augmentation shows what the views do."""

import numpy as np
import pytest
import torch
from PIL import Image

from data import preview
from data.preview import mosaic


def test_tiles_lie_where_they_should():
    red, blue = (torch.tensor(c).view(3, 1, 1).expand(3, 2, 2) for c in ([1.0, 0, 0], [0, 0, 1.0]))
    found = np.asarray(mosaic([[red, blue], [blue, red]], ["a", "b"], side=10))
    assert found.shape == (20 + 2 * 14 + 4, 2 * 14 + 4, 3)
    assert found[25, 5].tolist() == [255, 0, 0] and found[25, 19].tolist() == [0, 0, 255]
    assert found[39, 5].tolist() == [0, 0, 255] and found[39, 19].tolist() == [255, 0, 0]


def test_the_command_writes_a_picture_once(sample, recipe, tmp_path, capsys):
    out = tmp_path / "preview.png"
    flags = ["--recipe", recipe, "--out", str(out), "--quiet", "--count", "3"]
    columns = preview.main(flags)["columns"]
    assert columns == ["original"] + ["view1"] * 4 + ["view2"] * 4
    with Image.open(out) as picture:
        assert picture.size == (len(columns) * 100 + 4, 3 * 100 + 24)
    before = out.read_bytes()
    with pytest.raises(SystemExit) as stop:
        preview.main(flags)
    assert stop.value.code == 2 and out.read_bytes() == before
    assert str(out) in capsys.readouterr().err
