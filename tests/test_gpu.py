"""What needs a GPU, each in a fresh process: CUDA doesn't survive pytest's forks."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GPU_ENVIRONMENT, distance, metrics, momentum, state_of

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


@pytest.mark.parametrize("targets", ["--no-byol.whiten", "--byol.whiten"])
def test_float32_agrees_with_the_cpu(recipe, tmp_path, targets):
    """The same images and views: losses and gradients of three batches at the same weights."""
    flags = ["--steps", "3", "--optimizer", "sgd", "--lr", "0", targets]
    cuda = train(recipe, tmp_path / "cuda", *flags)
    python("train_byol.py", "--recipe", recipe, "--out", tmp_path / "cpu", *flags)
    cpu = metrics(tmp_path / "cpu")
    assert [r["loss"] for r in cuda] == pytest.approx([r["loss"] for r in cpu], rel=1e-3)
    assert distance(momentum(tmp_path / "cuda", 3), momentum(tmp_path / "cpu", 3)) < 0.1


def test_two_gpus_compute_the_losses_and_gradients_of_one(recipe, tmp_path):
    """DDP and batch norm over processes, by NCCL: one global batch at the same weights."""
    if int(python("-c", "import torch; print(torch.cuda.device_count())")) < 2:
        pytest.skip("needs two GPUs")
    flags = ["--steps", "3", "--optimizer", "sgd", "--lr", "0", "--precision", "fp32"]
    one = train(recipe, tmp_path / "one", *flags)
    two = train(recipe, tmp_path / "two", "--gpus", "2", *flags)
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-3)
    assert distance(momentum(tmp_path / "two", 3), momentum(tmp_path / "one", 3)) < 0.1


def test_resume_on_cuda(recipe, tmp_path):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "4")
    assert [r["step"] for r in train(recipe, out, "--resume")] == list(range(10))


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_compiled_steps_agree(recipe, tmp_path, accumulate):
    """CUDA graphs, with accumulate 1, see the weights change."""
    flags = ["--precision", "fp32", "--optimizer", "sgd", "--lr", "0.1", "--accumulate", accumulate]
    five = ["--stop-after", "5"]  # later, rounding has been amplified
    plain = train(recipe, tmp_path / "plain", *flags, *five)
    compiled = train(recipe, tmp_path / "compiled", *flags, *five, "--compile")
    assert [r["loss"] for r in compiled] == pytest.approx([r["loss"] for r in plain], rel=0.01)
    assert distance(momentum(tmp_path / "compiled", 5), momentum(tmp_path / "plain", 5)) < 0.1
    rows = train(recipe, tmp_path / "compiled", *flags, "--compile", "--resume")
    assert len(rows) == 10 and all(0 < r["loss"] < 8 for r in rows)


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


def test_images_in_the_gpus_memory_are_the_same(recipe, tmp_path):
    flags = ["--precision", "fp32", "--lr", "0"]  # no update that would amplify rounding
    there = train(recipe, tmp_path / "there", "--data-on-device", "always", *flags)
    here = train(recipe, tmp_path / "here", "--data-on-device", "never", *flags)
    assert [r["loss"] for r in there] == pytest.approx([r["loss"] for r in here], rel=1e-3)


NO_WAITING = """
import sys
import torch
import train_byol
from byol.byol import BYOL
from training.encoder import Encoder
from data import datasets
from data.loader import Loader
from data.transform import EvalTransform
from training.distributed import start
from training.session import Session
from training.stopping import Watch

flags = ["--recipe", sys.argv[1], "--out", sys.argv[2], "--device", "cuda", "--precision", "bf16"]
config = train_byol.configure([*flags, "--data-on-device", sys.argv[3], "--optimizer", sys.argv[4],
                               "--lr", "0.01", "--byol.whiten"])
processes = start("cuda", 1, 60, quiet=True)
data = datasets.load(config.data)
images, _ = data.pretraining(config.data.pretrain_on)
method = BYOL(Encoder("resnet18", "small", 0.125), config.method)
views = (config.view1, config.view2)
transform = EvalTransform.of(config.data, images.shape, *images.statistics())
loader = Loader.of(config, images, None, views, transform, processes)
watch = Watch(processes, config.run.check_every)
steps = Session(config, method, loader, transform, processes, watch).steps()
for _ in range(3):
    next(steps)
torch.cuda.set_sync_debug_mode("error")
for _ in range(5):
    next(steps)
"""


@pytest.mark.parametrize("optimizer", ["lars", "sgd", "adamw"])
@pytest.mark.parametrize("where", ["always", "never"])
def test_a_step_does_not_wait_for_the_gpu(recipe, tmp_path, where, optimizer):
    python("-c", NO_WAITING, recipe, tmp_path / "run", where, optimizer)
