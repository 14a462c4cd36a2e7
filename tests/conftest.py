"""One thread, no GPU in this process (its children are forked), and a recipe of seconds."""

import dataclasses
import hashlib
import json
import os
import signal
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
# as in a terminal, also where nohup or a shell's & has started the tests
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
    os.environ.pop(_name, None)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import data.sample  # noqa: E402
from data import stl10  # noqa: E402
from data.datasets import Dataset  # noqa: E402
from data.images import Images  # noqa: E402
from data.loader import Loader  # noqa: E402
from recipes import HEADS  # noqa: E402
from training import distributed  # noqa: E402
from training.session import Session  # noqa: E402

torch.set_num_threads(1)
pytest_plugins = ["launchers", "folders"]  # fixtures that start torchrun; folders of images
HAS_CUDA = torch.cuda.device_count() > 0
GPU_ENVIRONMENT = dict(os.environ)
# CUDA doesn't survive a fork; tests marked gpu run in fresh processes, which get it back.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

TINY = (
    """
[data]
dataset = "sample"
crop_size = 16

[encoder]
stem = "small"
width = 0.125

[optim]
optimizer = "adamw"
lr = 1e-3
batch_size = 64
steps = 10

[run]
threads = 1
device = "cpu"
precision = "fp32"
log_every = 1
knn_every = 0
"""
    + HEADS
    + """
[baseline]
optimizer = "sgd"
lr = 0.1
batch_size = 20
steps = 5

[finetune]
optimizer = "sgd"
lr = 0.1
batch_size = 20
steps = 5

[mlp]
hidden = 16
steps = 20

[reproduce]
budgets = [20, 40]
draws = 2
trained_draws = 2
"""
)


def pytest_collection_modifyitems(items):
    """Tests marked gpu need one."""
    for item in items:
        if "gpu" in item.keywords and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def one_thread():
    """A thread pool in this process would hang the children that are forked from it."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def float64(monkeypatch):
    """Scripts train in float64, here and in forked processes; evaluations after it are in float32.

    To compare runs that sum in different orders: in float32 a ReLU near zero is on in one run and
    off in the other, so losses that agree to 1e-6 before the first update differ by percents a few
    steps later.  Evaluations during the training (--knn-every) fail.
    """
    of, wrap, steps = Loader.of.__func__, distributed.wrap, Session.steps

    def in_float64(cls, *settings):
        return dataclasses.replace(of(cls, *settings), dtype=torch.float64)

    def then_float32(session):
        yield from steps(session)
        session.method.float()

    monkeypatch.setattr(Loader, "of", classmethod(in_float64))
    monkeypatch.setattr(distributed, "wrap", lambda method, *rest: wrap(method.double(), *rest))
    monkeypatch.setattr(Session, "steps", then_float32)


@pytest.fixture
def recipe(tmp_path) -> str:
    """Path of a recipe that every script ends within a second."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="session")
def subset() -> Dataset:
    """100 labelled, 220 unlabelled and 100 test images: 5 steps an epoch at batch 64."""
    full = data.sample.load(Path("."), None)

    def few(images, count):
        return Images([images.parts[0][:count]])

    def classes(images, labels):
        rows = np.sort(np.concatenate([np.flatnonzero(labels == c)[:10] for c in range(10)]))
        return Images([images.parts[0][rows]]), labels[rows]

    train, train_labels = classes(full.train, full.train_labels)
    test, test_labels = classes(full.test, full.test_labels)
    unlabelled = few(full.unlabelled, 220)
    return Dataset(train, train_labels, unlabelled, test, test_labels, full.class_names)


@pytest.fixture
def sample(monkeypatch, subset) -> Dataset:
    """`--dataset sample` means the subset, in this process and in those forked from it."""
    monkeypatch.setattr(data.sample, "load", lambda root, config: subset)
    return subset


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, subset) -> Path:
    """A finished run of BYOL on the subset, evaluated by linear_eval.py; read it only."""
    import linear_eval
    import train_byol

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sample, "load", lambda root, config: subset)
        flags = ["--recipe", str(folder / "tiny.toml"), "--out", str(folder / "run"), "--quiet"]
        train_byol.main(argv=[*flags, "--knn-every", "5"])
        linear_eval.main(["--ckpt", str(folder / "run"), "--quiet"])
    return folder / "run"


def stl10_files(root: Path) -> Path:
    """STL-10's files with 2 black training images, 1 test image and 1 unlabelled; their folder."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for part, labels in (("train", [1, 10]), ("test", [1])):
        (folder / f"{part}_X.bin").write_bytes(bytes(len(labels) * stl10.IMAGE))
        (folder / f"{part}_y.bin").write_bytes(bytes(labels))
    (folder / "unlabeled_X.bin").write_bytes(bytes(stl10.IMAGE))
    (folder / "class_names.txt").write_text("a b c d e f g h i j")
    (folder / "fold_indices.txt").write_text("0 1\n" * 10)
    return folder


def digest(value) -> str:
    """SHA-256 of nested dicts, lists, tensors and plain values, bit for bit."""
    sha = hashlib.sha256()

    def add(item):
        if isinstance(item, torch.Tensor):
            item = item.detach().cpu().contiguous()
            sha.update(str((item.dtype, tuple(item.shape))).encode())
            sha.update(item.view(-1).view(torch.uint8).numpy().tobytes() if item.numel() else b"")
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                sha.update(repr(key).encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            sha.update(f"{len(item)} items".encode())
            for one in item:
                add(one)
        else:
            sha.update(repr(item).encode())

    add(value)
    return sha.hexdigest()


def state_of(out: Path, steps: int) -> dict:
    """The training state that a run saved after `steps` steps."""
    path = Path(out) / "checkpoints" / f"step-{steps:08d}.pt"
    return torch.load(path, map_location="cpu", weights_only=True)


def trained(out: Path, steps: int) -> str:
    """SHA-256 of all that training has changed: networks, optimizer, scaler."""
    state = state_of(out, steps)
    return digest({k: state[k] for k in ("model", "optimizer", "scaler", "step")})


def momentum(out: Path, steps: int) -> list[torch.Tensor]:
    """SGD's momentum after `steps` steps: after one step, the gradient."""
    state = state_of(out, steps)["optimizer"]["state"]
    return [of_parameter["momentum_buffer"] for of_parameter in state.values()]


def distance(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """|found - expected| / |expected|, all tensors taken together.

    Between float32 gradients of one and of two processes it was 2e-5, and up to 0.01 where a ReLU
    near zero was on in one and off in the other; a factor of 2 between them makes it 0.5 or 1.
    """
    a, b = (torch.cat([t.double().flatten() for t in x]) for x in (found, expected))
    return ((a - b).norm() / b.norm()).item()


def metrics(out: Path) -> list[dict]:
    """The rows of metrics.jsonl without the time fields."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]
