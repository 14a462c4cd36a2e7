"""Several processes and several machines; here each machine is an agent of torchrun of its own.

Those marked `scale` run with `make test-scale`.
"""

import json
import os
import re
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import digest, distance, metrics
from launchers import TORCHRUN, equal, newest, rows, settings
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.flop_counter import FlopCounterMode

import train_byol
from baseline.baseline import Baseline
from byol.byol import BYOL
from data.loader import Loader
from data.views import View2Config, ViewConfig
from eval.probe import OnlineProbe
from training import batchnorm, distributed
from training.checkpoints import Checkpoints
from training.distributed import Processes
from training.encoder import Encoder
from training.loop import Precision, train_steps
from training.optimizers import build_optimizer
from training.resume import newest_valid
from variants.barlow_twins import BarlowTwins
from variants.dino import DINO
from variants.moco_v3 import MoCoV3
from variants.simclr import SimCLR
from variants.simsiam import SimSiam
from variants.vicreg import VICReg

ROOT = Path(train_byol.__file__).parent
CPU = torch.device("cpu")
scale = pytest.mark.scale
METHODS = {
    "byol": lambda e: BYOL(e, BYOL.Config(hidden=16, projection=8)),
    "simsiam": lambda e: SimSiam(e, SimSiam.Config(projection=16, hidden=8)),
    "simclr": lambda e: SimCLR(e, SimCLR.Config(hidden=16, projection=8)),
    "barlow_twins": lambda e: BarlowTwins(e, BarlowTwins.Config(projection=8)),
    "vicreg": lambda e: VICReg(e, VICReg.Config(projection=8)),
    "moco_v3": lambda e: MoCoV3(e, MoCoV3.Config(hidden=16, projection=8)),
    "dino": lambda e: DINO(e, DINO.Config(16, prototypes=12, local_views=2, local_size=12)),
    "baseline": lambda e: Baseline(e, Baseline.Config(), classes=10),
    "probe": lambda e: OnlineProbe(SimCLR(e, SimCLR.Config(hidden=16, projection=8)), classes=10),
}


def train(data, name: str, accumulate: int, steps: int, dtype):
    """(final state, losses of the global batch) of `steps` steps, batch 32."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    processes = Processes(distributed.own_rank(), ranks, CPU)
    torch.manual_seed(0)
    method = METHODS[name](Encoder("resnet18", "small", 1 / 16)).to(dtype)
    images, labels = data.unlabelled, None
    if method.uses_labels:
        images, labels = data.train, data.train_labels.copy()
    if name == "probe":  # the ranks get different numbers of known labels
        labels[np.arange(len(labels)) % 7 > 1] = -1
    views = method.views or (ViewConfig(), View2Config())
    sizes, normalization = (16, 32), images.statistics()
    loader = Loader(images, labels, views, *sizes, *normalization, accumulate=accumulate,
                    rank=processes.rank, world_size=ranks, dtype=dtype)  # fmt: skip
    model = distributed.wrap(method, processes, "sync")
    kind, peak = (
        ("lars", 0.5) if name == "byol" else ("sgd", 0.005)
    )  # LARS hides a gradient's scale
    optimizer = build_optimizer(kind, method.parameter_groups(1e-3), 0.9)
    found, precision = [], Precision("fp32", CPU)
    for step in train_steps(model, loader, optimizer, precision, peak=peak, warmup=2, total=steps):
        found.append(float(distributed.sum_over_ranks(step.loss.clone().double())) / ranks)
    return {k: v.clone() for k, v in method.state_dict().items()}, found


@pytest.mark.parametrize("name, ranks, accumulate, steps", [
    *((name, 2, 1, 3) for name in METHODS),
    *(pytest.param(n, r, a, 10, marks=scale)
      for n in ("byol", "baseline", "simclr") for r, a in ((2, 2), (4, 1))),
])  # fmt: skip
def test_any_number_of_processes_is_one(subset, name, ranks, accumulate, steps):
    """In float64 weights, running statistics and losses agree to 1e-9 of a process's own."""
    one, losses = train(subset, name, accumulate, steps, torch.float64)
    several = forked.run(train, subset, name, accumulate, steps, torch.float64, ranks=ranks)
    assert len({digest(state) for state, _ in several}) == 1
    assert all(found == several[0][1] for _, found in several)
    assert several[0][1] == pytest.approx(losses, rel=1e-9)
    for key, value in one.items():
        torch.testing.assert_close(several[0][0][key], value, rtol=1e-9, atol=1e-9, msg=key)
    assert losses[0] != losses[-1]


@scale
@pytest.mark.parametrize("name", ["byol", "baseline", "simclr"])
def test_four_processes_in_float32_agree_until_the_first_update(subset, name):
    """Losses to 1e-5, the first update to a tenth and running statistics to 1e-4."""
    start, _ = train(subset, name, 1, 0, torch.float32)
    one, losses = train(subset, name, 1, 2, torch.float32)  # the rate of step 0 is 0
    (four, found), *_ = forked.run(train, subset, name, 1, 2, torch.float32, ranks=4)
    assert found == pytest.approx(losses, rel=1e-5)
    statistics = {k for k in start if "running" in k}
    for key in statistics:
        torch.testing.assert_close(four[key], one[key], rtol=1e-4, atol=1e-5, msg=key)
    weights = [k for k in start if k not in statistics and "num_batches" not in k]
    update, expected = ([state[k] - start[k] for k in weights] for state in (four, one))
    assert distance(update, expected) < 0.1


@scale
@pytest.mark.parametrize("script", ["train_baseline", "finetune", "linear_eval"])
def test_every_script_takes_gpus(two, tmp_path, launch, script):
    """As typed, from the run of `two`; the same figure as with one process, up to rounding."""
    found = {}
    shared = ["--labels", 20, "--device", "cpu", "--recipe", two / "tiny.toml"]
    shared += ["--ckpt", two / "run"] if script != "train_baseline" else []
    for gpus in (1, 2):
        out = tmp_path / str(gpus)
        run = launch(f"{script}.py", *shared, "--gpus", gpus, "--out", out)
        assert run.wait() == 0, run.log.read_text()
        found[gpus] = json.loads((out / "result.json").read_text())["top1"]
        assert script == "linear_eval" or f"{gpus} x cpu" in run.log.read_text()
    assert found[2] == pytest.approx(found[1], abs=3)
    if script != "linear_eval":  # before step 1 only the head has moved, which amplifies nothing
        one, two = ([r["loss"] for r in metrics(tmp_path / name)[:2]] for name in "12")
        assert two == pytest.approx(one, rel=1e-5)


# Several machines


def agent(port: int, nodes: str, *more) -> list:
    """One machine of several: the words before the script."""
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id",
                  "test", "--rdzv-conf", "last_call_timeout=10,keep_alive_interval=1",
                  "--local-addr", "127.0.0.1"]  # fmt: skip
    return ["-m", "torch.distributed.run", "--nnodes", nodes, "--nproc-per-node", 1, *rendezvous,
            *more, "train_byol.py"]  # fmt: skip


@pytest.fixture
def port(monkeypatch) -> int:
    # or the machines that are left never tell a newcomer where to meet (torch 2.14)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def listens(port: int) -> bool:
    """Whether the first machine is there: it holds the rendezvous, and is not to die."""
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


def saved_by_two(out) -> bool:
    return newest_valid(Checkpoints(out / "checkpoints", 0))["processes"] == 2


@scale
def test_two_machines_are_one(two, tmp_path, launch, port):
    out = tmp_path / "run"
    flags = settings(two / "tiny.toml", out)
    machines = [launch(*agent(port, "2"), *flags) for _ in range(2)]
    assert [machine.wait() for machine in machines] == [0, 0]
    assert equal(out, two)


@scale
def test_a_machine_that_dies_and_comes_back_goes_on_from_the_checkpoint(
    two, tmp_path, launch, port
):
    out = tmp_path / "run"
    words = [*agent(port, "2", "--max-restarts", 3), *settings(two / "tiny.toml", out), "--resume"]
    first = launch(*words)
    first.until(lambda: listens(port))
    second = launch(*words)
    second.until(lambda: rows(out) >= 7 and first.ranks() and second.ranks() and saved_by_two(out))
    os.kill(second.process.pid, signal.SIGKILL)
    second.process.wait()
    second.gone(10)
    again = launch(*words)
    assert first.wait(150) == 0 and again.wait(30) == 0, first.log.read_text()
    assert equal(out, two)


@scale
def test_with_elastic_sizes_the_machine_that_is_left_goes_on_alone(two, tmp_path, launch, port):
    """Losses bit for bit up to the checkpoint; the first one after it to 1e-5."""
    out = tmp_path / "run"
    flags = [*settings(two / "tiny.toml", out), "--resume", "--log-every", 1]
    words = [*agent(port, "1:2", "--max-restarts", 3), *[f for f in flags if f != "--quiet"]]
    machines = [launch(*words)]
    machines[0].until(lambda: listens(port))
    machines.append(launch(*words))
    machines[0].until(
        lambda: rows(out) >= 7 and all(m.ranks() for m in machines) and saved_by_two(out)
    )
    machines[1].process.kill()
    machines[1].process.wait()
    machines[1].gone(10)
    assert machines[0].wait(150) == 0, machines[0].log.read_text()
    text = machines[0].log.read_text()
    assert "going on with 1 processes after 2" in text
    done = int(re.findall(r"going on from step (\d+)", text)[0])
    losses = [[row["loss"] for row in metrics(run)] for run in (out, two / "run")]
    assert done >= 5 and losses[0][:done] == losses[1][:done]
    assert losses[0][done] == pytest.approx(losses[1][done], rel=1e-5)  # at the same weights
    assert len(losses[0]) == 40 and newest(out) == 40


@scale
def test_S8_a_rank_that_stands_still_ends_the_job_after_the_timeout(two, tmp_path, launch):
    out = tmp_path / "run"
    flags = [*settings(two / "tiny.toml", out, steps=100000), "--dist-timeout", 5]
    run = launch(*TORCHRUN, "train_byol.py", *flags)
    run.until(lambda: rows(out) >= 3 and len(run.ranks()) == 2)
    os.kill(run.ranks()[1], signal.SIGSTOP)
    assert run.wait(90) == 1
    assert "lost touch with another process" in run.log.read_text()


# What a step costs


def counted(arch: str, side: int) -> dict[str, float]:
    """GFLOP an image of the backward pass, and what a step sends."""
    with torch.device("meta"):
        method, view = BYOL(Encoder(arch), BYOL.Config()), torch.empty(2, 3, side, side)
        loss, _ = method.loss(method(view, view))
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return {"backward": backward.get_total_flops() / 2 / 1e9} | counted_of(method)


def counted_of(method) -> dict[str, float]:
    """MB of gradients; batch norm's collectives and their MB."""
    norms = [m for m in method.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    trained = [m for m in norms if m.weight.requires_grad]
    return {
        "gradients": sum(p.numel() for p in method.parameters() if p.requires_grad) * 4 / 1e6,
        "collectives": 2 * (len(norms) + len(trained)),  # two views; forward, and backward
        "statistics": 2 * 8 * sum(m.num_features for m in norms + trained) / 1e6,  # two floats each
    }


def images_to_hide(counts: dict[str, float], gpus: int, gigabytes: float) -> float:
    """Images a GPU whose backward pass takes as long as the all-reduce, at 100 TFLOP/s a GPU."""
    seconds = 2 * (gpus - 1) / gpus * counts["gradients"] / 1e3 / gigabytes
    return seconds * 100e3 / counts["backward"]


def test_the_arithmetic_of_the_page_is_that_of_the_code():
    page = " ".join((ROOT / "docs/scaling.md").read_text().split())
    small, large = counts = counted("resnet18", 96), counted("resnet50", 224)
    links = (8, 300), (64, 50), (64, 1.25)
    bounds = [[f"{images_to_hide(c, *link):,.0f}" for c in counts] for link in links]
    for text in (
        f"{small['gradients']:.1f} MB for ResNet-18, {large['gradients']:.1f} MB for ResNet-50",
        f"{small['backward']:.2f} GFLOP an image for ResNet-18 at 96 pixels",
        f"{large['backward']:.1f} for ResNet-50 at 224",
        *(f"from {' and '.join(bound)} " for bound in bounds),
        f"{small['collectives']} and {large['collectives']} small messages a step",
        f"{small['collectives'] * 0.03:.1f} ms for ResNet-18",
    ):
        assert text in page, text


def traffic():
    """(bytes of gradients that DDP sends, collectives of batch norm and their bytes) of a step."""
    sent, found = [], []
    method = BYOL(Encoder("resnet18", "small", 1 / 16), BYOL.Config(hidden=16, projection=8))
    model = distributed.wrap(method, Processes(dist.get_rank(), 2, CPU), "sync")

    def hook(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(None, bucket)

    def watched(honest):
        def call(*args, **keywords):
            found.append(args[-1].nbytes)
            return honest(*args, **keywords)

        return call

    model.register_comm_hook(None, hook)
    batchnorm.dist = SimpleNamespace(
        all_gather=watched(dist.all_gather), all_reduce=watched(dist.all_reduce),
        get_world_size=dist.get_world_size, is_initialized=dist.is_initialized,
    )  # fmt: skip
    loss, _ = method.loss(model(*torch.rand(2, 4, 3, 16, 16)))
    loss.backward()
    return sum(sent), len(found), sum(found), counted_of(method)


def test_what_is_sent_is_what_is_counted():
    gradients, collectives, statistics, expected = forked.run(traffic, ranks=2)[0]
    assert gradients / 1e6 == pytest.approx(expected["gradients"])
    assert collectives == expected["collectives"]
    assert statistics / 1e6 == pytest.approx(expected["statistics"])
