"""Whole training steps on cuda, mps and xpu without one of them, by torch's fake tensors.

A fake tensor has shape, type and device, but no values.  All code of a step is the real one, the
backward pass and torch's optimizers included.  `Rules` raises where tensors of the CPU and the
device meet, where the host would wait for the device, for float64, which mps lacks, and for
channels-last memory on mps and xpu: on mps, torch computed batch norm's gradients wrongly in it.
Not seen here: autocast, several processes, numbers.  tests/test_gpu.py is for those.
"""

import dataclasses
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from kernel_count import Launches
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from baseline.baseline import Baseline, Finetune
from byol.byol import BYOL
from core.device import BACKENDS, to_device
from data.datasets import Dataset
from data.images import Images
from data.loader import Loader
from data.transform import EvalTransform
from data.views import View2Config, ViewConfig
from eval.online import OnlineEval
from eval.probe import OnlineProbe
from eval.trained import FrozenEncoder
from training import distributed, loop
from training.distributed import Processes, start, wrap
from training.encoder import Encoder
from training.loop import Precision, pick_precision, train_steps
from training.optimizers import build_optimizer
from training.run_folder import RunFolder, read_metrics
from training.session import groups_of
from training.stopping import Watch
from variants.barlow_twins import BarlowTwins
from variants.dino import DINO
from variants.moco_v3 import MoCoV3
from variants.simclr import SimCLR
from variants.simsiam import SimSiam
from variants.vicreg import VICReg

METHODS = (Baseline, Finetune, SimSiam, SimCLR, BarlowTwins, VICReg, MoCoV3)
OPTIMIZERS = ("lars", "sgd", "adamw")
SMALL = dict(hidden=8, projection=8, prototypes=8, local_views=2, local_size=12, shift=2)
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 3, 24, 24), np.uint8)
CROPS = tuple(ViewConfig(jitter_p=0, grey_p=0, blur_p=blur_p) for blur_p in (1, 0))  # fast
META = torch.device("meta")
kinds = pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])


class Waits(Exception):
    """The host would wait for the device."""


class Mixed(Exception):
    """Tensors of the CPU and of the device in one operation."""


class Float64(Exception):
    """A float64 tensor on the device."""


class Fakes(FakeTensorMode):
    """Fake tensors on a device that torch's C++ takes for `meta`, since it can't ask the real one.

    That gives autograd's engine a device; Python sees the name of the real one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.device = device

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if operation is torch.ops.prim.device.default:  # C++ asks for a tensor's device
            return META if on_device(args[0]) else args[0].fake_device
        if kwargs.get("device") == META:  # and makes another one there
            kwargs["device"] = self.device
        return super().__torch_dispatch__(operation, types, args, kwargs)


class Rules(TorchDispatchMode):
    """What no operation may do; `readers` may read from the device: function -> what it reads."""

    def __init__(self, readers: dict) -> None:
        super().__init__()
        self.readers = {function.__code__: value for function, value in readers.items()}
        self.reads, self.training = 0, False

    def read(self, what) -> float:
        self.reads += 1
        return self.readers[called_from(self.readers, f"{what} reads from the device")]

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.prim.device.default:
            return operation(*args)
        kwargs, name = kwargs or {}, operation.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in inputs if on_device(x)]
        here = [x for x in inputs if not on_device(x)]
        if name == "_local_scalar_dense":  # item, tolist, if, float ...
            return self.read(name) if there else 1.0
        if name == "_linalg_check_errors":
            raise Waits("the host asks whether the factorization succeeded")
        if name == "_pin_memory":
            assert here and not there
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        if name.startswith("index") and any(
            isinstance(x, Tensor) and x.dtype is torch.bool for x in tree_leaves(args[1])
        ):
            raise Waits("the host needs to know how many elements a mask chooses")
        copies = name in ("_to_copy", "copy_")
        # on a real device, too, a number on the CPU may take part in a pointwise operation
        numbers = torch.Tag.pointwise in operation.tags and not any(x.ndim for x in here)
        if here and there and not copies and not numbers:
            raise Mixed(name)
        if name == "convolution" and there[0].device.type not in BACKENDS:
            for x in there:
                last = x.is_contiguous(memory_format=torch.channels_last)
                assert x.is_contiguous() or not last, "channels-last memory"
        out = operation(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.dtype is torch.float64 and on_device(x) for x in made):
            scaler = {Precision.step.__code__}  # torch's own divides in float64, but not on mps
            if made[0].device.type != "cuda" or not self.readers.keys() & scaler:
                raise Float64(name)
            called_from(scaler, f"float64 from {name}", Float64)
        if there and not all(map(on_device, made)):
            self.read(name)
        if self.training and copies and here and on_device(made[0]):
            called_from({to_device.__code__}, "a copy to the device outside of to_device")
            fast = hasattr(here[0], "pinned") and kwargs.get("non_blocking")
            if made[0].device.type == "cuda" and not fast:
                raise Waits("a copy to the device that is not asynchronous from pinned memory")
        return out


def on_device(x: Tensor) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type != "cpu"


def called_from(codes, text: str, error=Waits):
    """The innermost of `codes` that is being executed, or the error."""
    frame = sys._getframe()
    while frame and frame.f_code not in codes:
        frame = frame.f_back
    if frame is None:
        raise error(text)
    return frame.f_code


@pytest.fixture(autouse=True)
def like_real_tensors(monkeypatch):
    """Optimizers take the path of real tensors, and to print a tensor is to read it."""
    monkeypatch.setattr(FakeTensor, "__repr__", lambda x: str(x.tolist()))
    _foreach_supported_types.append(FakeTensor)
    # autograd refuses to work in children that are forked later if its first pass is a fake one
    torch.zeros(1, requires_grad=True).sum().backward()
    yield
    _foreach_supported_types.remove(FakeTensor)


class Tiny(nn.Sequential):
    """An encoder of few operations."""

    feature_size = 8

    def __init__(self) -> None:
        layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class FastDINO(DINO):
    """DINO without color in its views."""

    def __init__(self, *settings) -> None:
        super().__init__(*settings)
        self.views = *CROPS, ViewConfig(size=12, jitter_p=0, grey_p=0)


def make(method_class, encoder=None, **options):
    options = {k: v for k, v in SMALL.items() if hasattr(method_class.Config, k)} | options
    classes = (4,) if issubclass(method_class, Baseline) else ()
    return method_class(encoder or Tiny(), method_class.Config(**options), *classes)


def processes_on(kind: str) -> Processes:
    """What --device KIND gives, which cuda does only where there is a GPU."""
    device = torch.device(kind, 0)  # without a number, torch's C++ would ask for the current one
    if kind == "cuda":
        return Processes(0, 1, device, quiet=True)
    here = {"return_value": torch.device(kind)}
    with mock.patch.object(torch.accelerator, "current_accelerator", **here):
        return dataclasses.replace(start(kind, 1, 60, quiet=True), device=device)


def train(out, kind, method, optimizer="sgd", accumulate=1, where="never", precision="fp32",
          views=CROPS, scaler=None):  # fmt: skip
    """Three steps, of which the second is neither logged nor looked at.

    scaler   the number that fp16's scaler reads
    """
    processes, rules = processes_on(kind), Rules({RunFolder.log: 0, Watch.look: 0})
    device = processes.device
    if kind != "cuda":
        precision = pick_precision(precision, device)
    if precision == "fp16":
        rules.readers[Precision.step.__code__] = scaler
    labels = np.arange(16) % 4 if method.uses_labels else None
    views = method.views or views
    with (
        Fakes(device),
        rules,
        RunFolder(out, {}, processes) as folder,
        Watch(processes) as watch,
    ):
        images = Images([PIXELS]).resident(device, where)
        loader = Loader(images, labels, views, 24, 8, [0.5] * 3, [0.25] * 3,
                        accumulate=accumulate, device=device)  # fmt: skip
        model = wrap(method, processes, "sync")
        updates = build_optimizer(optimizer, groups_of(method, 1e-4), momentum=0.9)
        folder.begin(0, 3)
        rules.training = True
        steps = train_steps(model, loader, updates, Precision(precision, device),
                            peak=0.1, warmup=1, total=3)  # fmt: skip
        for step in steps:
            before = rules.reads
            folder.log(step, every=2)
            watch.look(step, method, updates)
            assert (rules.reads > before) is (step.index != 1)
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(map(on_device, trained))
    if scaler is None:  # each had a gradient
        assert {id(p) for p in updates.state} == {id(p) for p in trained}
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == [0, 2]


@pytest.mark.parametrize("where", ["never", "always"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_byol(tmp_path, where, accumulate, optimizer):
    train(tmp_path, "cuda", make(BYOL), optimizer, accumulate, where)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_byol_without_cuda(tmp_path, kind, optimizer):
    train(tmp_path, kind, make(BYOL), optimizer, where="auto", precision="auto")


@kinds
@pytest.mark.parametrize("method_class", [*METHODS, FastDINO], ids=lambda c: c.name)
def test_each_method(tmp_path, kind, method_class):
    optimizer = method_class.defaults["optim"]["optimizer"]
    train(tmp_path, kind, make(method_class), optimizer, accumulate=2 if kind == "cuda" else 1)


@kinds
def test_whitened_targets(tmp_path, kind):
    train(tmp_path, kind, make(BYOL, whiten=True), "lars")


@kinds
def test_a_resnet_with_a_probe(tmp_path, kind):
    method = OnlineProbe(make(BYOL, Encoder("resnet18", "imagenet", 1 / 16)), 4)
    train(tmp_path, kind, method, "lars", where="always", views=(ViewConfig(), View2Config()))


@pytest.mark.parametrize("kind", ["cuda", "mps"])  # fp16 is refused on others
@pytest.mark.parametrize("scaler", [0.0, 1.0])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_fp16s_scaler_alone_reads_in_a_step(tmp_path, monkeypatch, kind, scaler):
    """1: it has found an infinite gradient and skips the optimizer's step; 0: it does not."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    train(tmp_path, kind, make(BYOL), precision="fp16", scaler=scaler)


@pytest.mark.parametrize("kind, accumulate, ranks, mode", [
    ("cuda", 1, 1, "reduce-overhead"), ("cuda", 2, 1, None), ("cuda", 1, 2, None),
    ("xpu", 1, 1, None),
])  # fmt: skip
def test_cuda_graphs_only_where_a_step_has_one_part(monkeypatch, kind, accumulate, ranks, mode):
    """With two parts torch refused: the second had overwritten the gradients of the first."""
    asked, processes, method = [], processes_on(kind), make(BYOL)
    processes = dataclasses.replace(processes, world_size=ranks)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **flags: asked.append(flags["mode"]))
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda model, **_: model)
    with Fakes(processes.device):
        wrap(method, processes, "local", compiled=True, accumulate=accumulate)
    assert asked == [mode]


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_evaluation_without_cuda(kind):
    """A frozen encoder's inputs and features, and the collapse metrics of pretraining."""
    processes, images = processes_on(kind), Images([PIXELS])
    device, transform = processes.device, EvalTransform([0.5] * 3, [0.25] * 3, size=28, crop=24)
    method, encoder = make(BYOL), Encoder("resnet18", "small", 1 / 16).eval()
    with Fakes(device), Rules({OnlineEval.measure: 0}):
        frozen = FrozenEncoder(encoder, transform, processes)
        assert on_device(frozen.encoder(transform(images.take(np.arange(4), device))))
        wrap(method, processes, "sync")
        loader = Loader(images, None, CROPS, 24, 8, [0.5] * 3, [0.25] * 3, device=device)
        unlabelled = Dataset(None, None, images, None, None, [])
        online = OnlineEval(unlabelled, loader, transform, processes, every=1, total=9)
        metrics, _ = online.measure(method, 8)
    assert metrics.keys() >= {"std/representation", "rank/projection"}


MISTAKES = {
    "a number": (lambda q: q.mean().item(), Waits),
    "a list": (lambda q: q[0, 0].tolist(), Waits),
    "a condition": (lambda q: 1 if q.isnan().any() else 0, Waits),
    "a copy": (lambda q: q.cpu(), Waits),
    "a print": (lambda q: print(q.mean()), Waits),
    "a mask": (lambda q: q[q > 0], Waits),
    "a masked assignment": (lambda q: q.detach().clone().__setitem__(q > 0, q.min()), Waits),
    "a checked factorization": (lambda q: torch.linalg.cholesky(q[0].T @ q[0]), Waits),
    "a shape by the data": (lambda q: q.nonzero(), DynamicOutputShapeException),
    "a new tensor": (lambda q: torch.tensor(0.5, device=q.device) * q, Waits),
    "a tensor of the CPU": (lambda q: q + torch.zeros(q.shape[-1]), Mixed),
    "indices of the CPU": (lambda q: q[:, torch.arange(2)], Mixed),
    "a number among others": (lambda q: torch.stack([q.mean(), torch.zeros(())]), Mixed),
    "float64": (lambda q: q.double(), Float64),
    "an array": (lambda q: torch.from_numpy(np.zeros(2)).to(q.device), Float64),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_loss_is_caught(tmp_path, monkeypatch, mistake):
    operation, error = MISTAKES[mistake]
    loss = BYOL.loss

    def mistaken(self, outputs):
        operation(outputs["prediction"])
        return loss(self, outputs)

    monkeypatch.setattr(BYOL, "loss", mistaken)
    with pytest.raises(error):
        train(tmp_path, "cuda", make(BYOL))


def test_a_print_in_the_loop_is_caught(tmp_path, monkeypatch):
    step = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a, **k: print(f"loss {step(*a, **k)[0]}"))
    with pytest.raises(Waits):
        train(tmp_path, "mps", make(BYOL))


def test_kernels_of_a_whole_step(tmp_path, monkeypatch):
    """Views, forward and backward pass, optimizer, moving average of a ResNet-18 in float32."""
    step, counts = loop.train_step, []

    def counted(*arguments, **more):
        with Launches() as launches:
            result = step(*arguments, **more)
        counts.append(launches)
        return result

    monkeypatch.setattr(loop, "train_step", counted)
    method = make(BYOL, Encoder("resnet18", "imagenet", 1 / 16))
    train(tmp_path, "cuda", method, "lars", views=(ViewConfig(), View2Config()))
    print("kernels of a step:", counts[-1].kernels.total(), counts[-1].foreach.total())
    assert counts[-1].kernels.total() <= 950 and counts[-1].foreach.total() <= 12
    assert counts[-1].copies == 2  # pixels and numbers
