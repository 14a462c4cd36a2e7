"""What needs a GPU, each in a fresh process: CUDA doesn't survive pytest's forks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPU_ENVIRONMENT, metrics, state_of

import train_byol

ROOT = Path(train_byol.__file__).parent
pytestmark = pytest.mark.gpu


def python(*arguments) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=GPU_ENVIRONMENT, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(recipe, out, *flags):
    python("train_byol.py", "--recipe", recipe, "--out", out, "--device", "cuda", *flags)
    return metrics(out)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(recipe, tmp_path, precision):
    rows = train(recipe, tmp_path / "run", "--precision", precision, "--knn-every", "5")
    assert len(rows) == 10 and all(0 < r["loss"] < 8 for r in rows)
    state = state_of(tmp_path / "run", 10)
    assert all(torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point())
    assert bool(state["scaler"]) is (precision == "fp16")


def test_float32_agrees_with_the_cpu(recipe, tmp_path):
    """The same images and views; the losses of the first steps to 1 %."""
    cuda = train(recipe, tmp_path / "cuda", "--steps", "3")
    python("train_byol.py", "--recipe", recipe, "--out", tmp_path / "cpu", "--steps", "3")
    cpu = metrics(tmp_path / "cpu")
    assert [r["loss"] for r in cuda] == pytest.approx([r["loss"] for r in cpu], rel=1e-2)


def test_resume_on_cuda(recipe, tmp_path):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "4")
    assert [r["step"] for r in train(recipe, out, "--resume")] == list(range(10))


CONVERSION = """
import torch
from torch import nn
from training.batchnorm import convert_batch_norm
model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).cuda()
names = list(model.state_dict())
model = convert_batch_norm(model, torch.device("cuda", 0))
assert isinstance(model[1], nn.SyncBatchNorm) and list(model.state_dict()) == names
"""


def test_batch_norm_becomes_torchs_own(tmp_path):
    python("-c", CONVERSION)
