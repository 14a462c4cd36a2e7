"""The code of docs/fork.md runs."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import metrics, state_of
from torch import nn

import finetune
import linear_eval
import train_byol
from byol.byol import BYOL, regression_loss, whiten
from data import datasets
from training import session
from training.encoder import ENCODERS, Encoder
from variants.simsiam import SimSiam

ROOT = Path(train_byol.__file__).parent
PAGE = (ROOT / "docs/fork.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_worked_example_is_a_script_with_two_processes_alike(recipe, tmp_path, float64):
    """The script's first loss is that of one process; in float64 all losses are."""
    script = tmp_path / "alignment.py"
    script.write_text("\n".join(blocks("python")))
    flags = ["--recipe", recipe, "--alignment.hidden", "32", "--steps", "4", "--optimizer", "sgd",
             "--lr", "0.01"]  # fmt: skip
    words = [sys.executable, script, *flags, "--out", tmp_path / "script", "--gpus", "2"]
    words += ["--knn-every", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, words)), env=environment, text=True, capture_output=True,
                          timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr

    spec = importlib.util.spec_from_file_location("alignment", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["alignment"] = module
    spec.loader.exec_module(module)
    for ranks in (1, 2):
        out = ["--out", str(tmp_path / str(ranks)), "--quiet"]
        forked.run(train_byol.main, module.Alignment, [*flags, *out], ranks=ranks)
    script, one, two = (metrics(tmp_path / name) for name in ("script", "1", "2"))
    assert {"alignment", "uniformity"} <= set(script[-1]) and "std/projection" in script[1]
    assert len(script) == 4 and script[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-9)


def test_the_classes_of_the_ablations_are_what_they_say():
    namespace = {"__name__": "variants.ablations"}
    exec(blocks("py")[0], namespace)
    torch.manual_seed(0)
    encoder, config = Encoder("resnet18", "small", 1 / 16), BYOL.Config(hidden=8, projection=4)
    q, z = torch.randn(2, 2, 5, 4)
    loss, _ = namespace["OneDirection"](encoder, config).loss({"prediction": q, "target": z})
    assert loss == pytest.approx(regression_loss(q[0], z[1]).mean())
    whitening = BYOL.Config(hidden=8, projection=4, whiten=True)
    loss, _ = namespace["OneDirection"](encoder, whitening).loss({"prediction": q, "target": z})
    assert loss == pytest.approx(regression_loss(q[0], whiten(z)[1]).mean())
    bare = namespace["NoBatchNorm"](encoder, config)
    heads = (bare.projector, bare.predictor, bare.target_projector)
    assert not [m for head in heads for m in head.modules() if isinstance(m, nn.BatchNorm1d)]
    bare.loss(bare(*torch.randn(2, 4, 3, 16, 16)))[0].backward()


FLAGS = re.findall(r"\| `(--[^`]*)`", PAGE)


@pytest.mark.parametrize("flags", FLAGS)
def test_the_flags_of_the_ablations_are_read(flags, recipe):
    config = train_byol.configure(["--recipe", recipe, *flags.split()])
    assert config.typed and len(FLAGS) >= 4


def test_symmetric_views_are_equal(recipe):
    (flags,) = [f for f in FLAGS if "view2.blur-p 1" in f]
    config = train_byol.configure(["--recipe", recipe, *flags.split()])
    assert vars(config.view1) == vars(config.view2)


class Forgetful(BYOL):
    """A generator is a list of parameters too."""

    name = "forgetful"
    forgotten = ""

    def parameter_groups(self, weight_decay):
        kept = (p for n, p in self.named_parameters() if p.requires_grad and n != self.forgotten)
        return [{"params": kept}]


def test_a_parameter_that_no_group_has_is_named(sample, recipe, tmp_path, capsys):
    flags = ["--recipe", recipe, "--quiet", "--steps", "1", "--out"]
    Forgetful.forgotten = "predictor.3.weight"
    with pytest.raises(SystemExit):
        train_byol.main(Forgetful, [*flags, str(tmp_path / "a")])
    error = capsys.readouterr().err
    assert "predictor.3.weight is in no group of forgetful's parameter_groups" in error
    Forgetful.forgotten = ""
    train_byol.main(Forgetful, [*flags, str(tmp_path / "b")])
    before, after = (
        torch.load(tmp_path / "b/checkpoints/step-00000001.pt", weights_only=True)["model"][name]
        for name in ("target_projector.3.weight", "projector.3.weight")
    )
    assert not torch.equal(before, after)


def test_an_unknown_table_of_defaults_is_named(recipe, tmp_path, capsys):
    class Unknown(BYOL):
        defaults = {"optimizer": {"lr": 1.0}}

    flags = ["--recipe", recipe, "--quiet", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        train_byol.main(Unknown, flags)
    assert "defaults: unknown table optimizer; did you mean optim?" in capsys.readouterr().err


class OwnEncoder(nn.Module):
    """A network of one's own, with the one attribute that the others ask for."""

    feature_size = 12

    def __init__(self, stem, width, zero_init):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, 2)

    def forward(self, x):
        return self.conv(x).relu().mean((2, 3))


def test_an_encoder_of_ones_own_is_one_line(sample, recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, "own", OwnEncoder)
    out = str(tmp_path / "run")
    train_byol.main(argv=["--recipe", recipe, "--arch", "own", "--out", out, "--quiet"])
    assert linear_eval.main(["--ckpt", out, "--quiet"])["top1"] > 0
    assert finetune.main(["--ckpt", out, "--labels", "20", "--quiet"])["top1"] > 0


OWN_DATA = '''
import numpy as np
from data.datasets import Dataset
from data.images import Images

def prepare(root, data):
    """Nothing to fetch."""

def load(root, data):
    """Ten classes of noise around a brightness."""
    rng, labels = np.random.default_rng(0), np.arange(100) % 10
    pixels = rng.integers(0, 60, (100, 3, 16, 16)) + 19 * labels[:, None, None, None]
    images = Images([pixels.astype(np.uint8)])
    return Dataset(images, labels, None, images, labels, [str(c) for c in range(10)])
'''


def test_a_data_set_of_ones_own_is_two_functions(recipe, tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    import own_data

    monkeypatch.setitem(sys.modules, "data.own", own_data)
    field = datasets.DataConfig.__dataclass_fields__["dataset"]
    choices = {**field.metadata, "choices": (*datasets.NAMES, "own")}
    monkeypatch.setattr(field, "metadata", choices)
    out = str(tmp_path / "run")
    train_byol.main(argv=["--recipe", recipe, "--dataset", "own", "--out", out, "--quiet"])
    assert linear_eval.main(["--ckpt", out, "--quiet"])["top1"] > 50


def test_an_augmentation_is_a_table(sample, recipe, tmp_path):
    Path(recipe).write_text(Path(recipe).read_text() + "\n[view2]\nsize = 12\nhue = 0.3\n")
    out = tmp_path / "run"
    train_byol.main(argv=["--recipe", recipe, "--out", str(out), "--steps", "2", "--quiet"])
    saved = json.loads((out / "config.json").read_text())["config"]["view2"]
    assert (saved["size"], saved["hue"], saved["blur_p"]) == (12, 0.3, 0.1)


class InverseRate(BYOL):
    def learning_rate(self, peak, step, warmup, total):
        return peak / (1 + step)


@pytest.mark.parametrize("flag", [[], ["--online-probe"]])
def test_a_schedule_is_a_function_of_the_step(sample, recipe, tmp_path, flag):
    out = str(tmp_path / "run")
    flags = ["--recipe", recipe, "--out", out, "--steps", "3", "--quiet", *flag]
    train_byol.main(InverseRate, flags)
    assert [row["lr"] for row in metrics(out)] == pytest.approx([1e-3, 1e-3 / 2, 1e-3 / 3])


def test_an_optimizer_is_made_in_one_place(sample, recipe, tmp_path, monkeypatch):
    def build(name, groups, momentum, nesterov=False):
        groups = [{k: v for k, v in group.items() if k != "adapt"} for group in groups]
        return torch.optim.RMSprop(groups, lr=0.0, momentum=momentum)

    monkeypatch.setattr(session, "build_optimizer", build)
    out = str(tmp_path / "run")
    train_byol.main(argv=["--recipe", recipe, "--out", out, "--steps", "3", "--quiet"])
    assert metrics(out)[-1]["loss"] > 0 and "square_avg" in str(state_of(out, 3)["optimizer"])


def test_a_group_can_keep_the_peak_of_the_rate(sample, recipe, tmp_path):
    """SimSiam's predictor."""
    out = str(tmp_path / "run")
    train_byol.main(SimSiam, ["--recipe", recipe, "--out", out, "--steps", "9", "--quiet"])
    rates = [group["lr"] for group in state_of(out, 9)["optimizer"]["param_groups"]]
    assert rates[1] == pytest.approx(1e-3) and rates[0] < 1e-4
