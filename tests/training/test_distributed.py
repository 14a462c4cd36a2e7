"""Two processes train like one; and which start replaces itself by torchrun."""

import os
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import forked
import pytest
import torch
import torch.distributed as dist
from conftest import digest

import train_byol
from byol.byol import BYOL
from core.errors import RunError, UserError, reason_of
from data.loader import Loader
from data.views import View2Config, ViewConfig
from training import distributed, replicas, session
from training.all_gather import all_gather
from training.checkpoints import Checkpoints
from training.distributed import Processes
from training.encoder import Encoder
from training.launch import RELAUNCHED, relaunch_if_needed
from training.loop import Precision, train_steps
from training.optimizers import build_optimizer

CPU = torch.device("cpu")


def train(images, accumulate, optimizer="lars", batch_norm="sync", whiten=False):
    """Four steps in float64; (parameters and buffers, losses summed over the processes)."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    processes = Processes(dist.get_rank() if ranks > 1 else 0, ranks, CPU)
    torch.manual_seed(0)
    encoder = Encoder("resnet18", "small", 1 / 16)
    method = BYOL(encoder, BYOL.Config(hidden=16, projection=8, whiten=whiten)).double()
    loader = Loader(images, None, (ViewConfig(), View2Config()), 8, 16, *images.statistics(),
                    accumulate=accumulate, rank=processes.rank, world_size=ranks,
                    dtype=torch.float64)  # fmt: skip
    model = distributed.wrap(method, processes, batch_norm)
    groups = build_optimizer(optimizer, method.parameter_groups(1e-3), 0.9)
    precision, losses = Precision("fp32", CPU), []
    for step in train_steps(model, loader, groups, precision, peak=0.5, warmup=1, total=4):
        losses.append(float(distributed.sum_over_ranks(step.loss.clone())) / ranks)
    before = digest(method.state_dict())
    if batch_norm == "local":
        replicas.broadcast_buffers(method)
    return {k: v.clone() for k, v in method.state_dict().items()}, losses, before


@pytest.mark.parametrize("accumulate, whiten", [(1, False), (2, False), (1, True), (2, True)])
def test_two_processes_are_one(subset, accumulate, whiten):
    """To 1e-8 in float64: weights, target, running statistics and losses.

    Two micro-batches differ from one batch (batch norm sees halves), but not between processes.
    """
    arguments = subset.unlabelled, accumulate, "lars", "sync", whiten
    one, losses, _ = train(*arguments)
    (first, losses1, _), (second, losses2, _) = forked.run(train, *arguments, ranks=2)
    assert digest(first) == digest(second) and losses1 == losses2
    assert losses1 == pytest.approx(losses, rel=1e-9)
    moved = 0.0
    for name, value in one.items():
        torch.testing.assert_close(first[name], value, rtol=1e-8, atol=1e-9, msg=name)
    start = BYOL(Encoder("resnet18", "small", 1 / 16), BYOL.Config(hidden=16, projection=8))
    moved = sum((one[k] - v).abs().sum() for k, v in start.named_parameters())
    assert moved > 1  # it did train


def test_micro_batches_are_not_the_whole_batch_for_batch_norm(subset):
    whole, _, _ = train(subset.unlabelled, 1)
    halves, _, _ = train(subset.unlabelled, 2)
    assert not torch.allclose(whole["encoder.conv1.weight"], halves["encoder.conv1.weight"])


def test_local_batch_norm_shares_rank_0s_buffers_on_request(subset):
    outcomes = forked.run(train, subset.unlabelled, 1, "sgd", "local", ranks=2)
    (first, _, before1), (second, _, before2) = outcomes
    assert before1 != before2  # each had statistics of its own
    assert digest(first) == digest(second)
    assert before1 == digest(first)  # and rank 0's won


# gathering and comparing


def gathered(x, weights):
    """A loss that compares all rows; the gradient of this rank's, averaged as DDP does."""
    rank, ranks = distributed.own_rank(), dist.get_world_size()
    mine = x.chunk(ranks)[rank].clone().requires_grad_(True)
    own = weights.chunk(ranks)[rank]
    everything = all_gather(mine)
    (own * (mine @ everything.T).tanh()).sum(1).mean().backward()
    return everything.detach(), mine.grad / ranks


def test_gradients_through_a_gather_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    x, weights = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 6, dtype=torch.float64)
    whole = x.clone().requires_grad_(True)
    (weights * (whole @ whole.T).tanh()).sum(1).mean().backward()
    for ranks in (2, 3):
        found = forked.run(gathered, x, weights, ranks=ranks)
        assert all(torch.equal(everything, x) for everything, _ in found)
        torch.testing.assert_close(torch.cat([grad for _, grad in found]), whole.grad)


def test_alone_there_is_nothing_to_gather():
    x = torch.randn(3, 2, requires_grad=True)
    assert all_gather(x) is x and distributed.own_rank() == 0


def difference(change):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(5), "c": torch.ones(2).double()}
    tensors |= {"d": torch.tensor([True, False]), "e": torch.ones(3, dtype=torch.bfloat16)}
    if dist.get_rank() == 1:
        change(tensors)
    method = torch.nn.Module()
    for name, tensor in tensors.items():
        method.register_buffer(name, tensor)
    try:
        replicas.compare_replicas(method, 1, False)
    except RunError as error:
        return str(error).split()[0]
    return ""


def next_float(tensors):
    tensors["a"][1, 2] = torch.nextafter(tensors["a"][1, 2], torch.tensor(9.0))
    tensors["c"] += 1


@pytest.mark.parametrize("change, name", [
    (lambda t: None, ""), (next_float, "a"), (lambda t: t["b"].add_(1), "b"),
    (lambda t: t["c"].neg_(), "c"), (lambda t: t["d"].logical_not_().fill_(True), "d"),
    (lambda t: t["e"].mul_(2), "e"),
])  # fmt: skip
def test_the_first_tensor_that_differs_between_ranks_is_named(change, name):
    assert forked.run(difference, change, ranks=2) == [name, name]


class Drifting(BYOL):
    """On rank 1, one weight of the encoder moves by itself in step 5."""

    def after_step(self, progress):
        logs = super().after_step(progress)
        if distributed.own_rank() == 1 and progress == 0.5:
            with torch.no_grad():
                self.encoder.layer3[0].bn1.weight[0] += 1e-3
        return logs


@pytest.mark.parametrize("compare, save", [(2, "4"), (1000, "2")])
def test_N6_a_replica_that_drifts_is_told_by_the_parameters_name(
    sample, recipe, tmp_path, monkeypatch, compare, save
):
    """At the next comparison, or before the next save at the latest."""
    monkeypatch.setattr(session, "COMPARE_EVERY", compare)
    out = tmp_path / "run"
    flags = ["--recipe", recipe, "--out", str(out), "--save-every", save]
    outcomes = forked.Children(train_byol.main, Drifting, flags, ranks=2).wait()
    assert [o.code for o in outcomes] == [1, 1]
    text = outcomes[0].output  # rank 1 would have told it later, were it not for the launcher
    assert "encoder.layer3.0.bn1.weight differs between the processes after step 6" in text
    names = sorted(p.name for p in (out / "checkpoints").glob("*.pt"))
    assert names[-1] == "step-00000004.pt"


def at_different_steps(recipe, out):
    if dist.get_rank() == 1:  # as if its disk were another one
        everything = Checkpoints.list
        Checkpoints.list = lambda self: everything(self)[:1]
    train_byol.main(argv=["--recipe", recipe, "--out", str(out), "--resume"])


def test_ranks_that_resume_at_different_steps_stop(sample, recipe, tmp_path):
    out = tmp_path / "run"
    flags = ["--recipe", recipe, "--out", str(out), "--stop-after", "4", "--save-every", "2"]
    forked.run(train_byol.main, BYOL, flags, ranks=2)
    outcomes = forked.Children(at_different_steps, recipe, out, ranks=2).wait()
    assert [o.code for o in outcomes] == [1, 1]
    assert "the number of steps differs between the processes" in "".join(
        o.output for o in outcomes
    )


def without_the_other() -> str:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.ones(3))
    except RuntimeError as error:
        return reason_of(error)


def test_a_rank_that_dies_is_one_line_for_the_others():
    outcome = forked.Children(without_the_other, ranks=2).wait()[0]
    assert outcome.value.startswith("lost touch with another process"), outcome


# which start replaces itself by torchrun


@pytest.fixture
def exec_(monkeypatch, tmp_path):
    """What os.execve was called with; empty if it was not."""
    monkeypatch.chdir(tmp_path)
    Path("some folder").mkdir()
    Path("some folder/train_byol.py").touch()
    called = []
    monkeypatch.setattr(os, "execve", lambda *args: called.append(args))
    for name in [n for n in os.environ if n.startswith("TORCHELASTIC_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv(RELAUNCHED, raising=False)
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    monkeypatch.setattr(sys, "argv", ["some folder/train_byol.py", "--x"])
    return called


def launched(monkeypatch, size: int, **more) -> None:
    """The environment under torchrun with `size` workers."""
    values = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": str(size), "RANK": "0",
              "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
              "MASTER_PORT": "29500"} | more  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)


ARGUMENTS = ["--gpus", "3", "--out", "a b", "--lr=0.1"]


def test_L1_plain_python_becomes_torchrun_with_the_same_arguments(exec_):
    relaunch_if_needed(3, "cpu", ARGUMENTS)
    path, command, environment = exec_[0]
    assert path == sys.executable
    assert command == [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       "--nproc-per-node=3", "some folder/train_byol.py", *ARGUMENTS]  # fmt: skip
    assert environment[RELAUNCHED] == str(os.getpid())
    assert environment["PATH"] == os.environ["PATH"]


def test_a_module_is_started_again_as_a_module(exec_, monkeypatch):
    script = sys.argv[0]  # that is where runpy puts the module's file
    sys.modules["__main__"].__spec__ = SimpleNamespace(name="variants.simsiam", origin=script)
    relaunch_if_needed(3, "cpu", ARGUMENTS)
    assert exec_[0][1][4:8] == ["--nproc-per-node=3", "-m", "variants.simsiam", "--gpus"]


@pytest.mark.parametrize("script", ["", "-", "-c", "gone.py"])
def test_no_script_to_start_again_is_one_line(exec_, monkeypatch, script):
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(UserError, match="--gpus 3: .*notebook.*in a shell"):
        relaunch_if_needed(3, "cpu", ARGUMENTS)
    assert exec_ == []


def test_the_launcher_leaves_a_hangup_alone_under_nohup(exec_):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        relaunch_if_needed(3, "cpu", ARGUMENTS)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGQUIT" in exec_[0][1]


def test_L1_torchrun_with_one_worker_becomes_torchrun_with_more(exec_, monkeypatch):
    launched(monkeypatch, 1, PET_NPROC_PER_NODE="1", GROUP_RANK="0", ROLE_NAME="default",
             TORCHELASTIC_MAX_RESTARTS="0", MASTERPIECE="kept")  # fmt: skip
    relaunch_if_needed(2, "cpu", ARGUMENTS)
    environment = exec_[0][2]
    prefixes = ("RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_", "MASTER_", "PET_", "TORCHELASTIC_")
    assert not [name for name in environment if name.startswith(prefixes)]
    assert environment["MASTERPIECE"] == "kept"


@pytest.mark.parametrize("given, gpus", [(2, 2), (4, 1), (1, 1)])
def test_nothing_happens_where_the_launcher_gave_enough(exec_, monkeypatch, given, gpus):
    launched(monkeypatch, given)
    relaunch_if_needed(gpus, "cpu", ARGUMENTS)
    assert exec_ == []


def test_L4_left_over_variables_are_no_launcher(exec_, monkeypatch):
    """A shell that once exported them: plain python --gpus 2 still starts two."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    relaunch_if_needed(2, "cpu", ARGUMENTS)
    assert exec_[0][1][4] == "--nproc-per-node=2" and "RANK" not in exec_[0][2]
    processes = forked.run(distributed.start, "cpu", 1, 60)[0]
    assert (processes.rank, processes.world_size) == (0, 1)


def test_L2_two_numbers_that_contradict_each_other(exec_, monkeypatch):
    launched(monkeypatch, 2)
    with pytest.raises(UserError, match="--gpus 4: the launcher started 2"):
        relaunch_if_needed(4, "cpu", ARGUMENTS)
    assert exec_ == []


def test_L2_it_does_not_start_itself_for_ever(exec_, monkeypatch):
    monkeypatch.setenv(RELAUNCHED, "1")
    with pytest.raises(UserError, match="--gpus 4"):
        relaunch_if_needed(4, "cpu", ARGUMENTS)
    assert exec_ == []


def test_L3_more_gpus_than_there_are(exec_, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--gpus 3: this machine has 2"):
        relaunch_if_needed(3, "auto", ARGUMENTS)
    launched(monkeypatch, 4)
    with pytest.raises(UserError, match="--nproc-per-node 4: this machine has 2"):
        relaunch_if_needed(1, "auto", ARGUMENTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda"):
        relaunch_if_needed(2, "cuda", ARGUMENTS)
    assert exec_ == []


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_L3_other_devices_than_cpu_and_cuda_take_one_process(exec_, monkeypatch, kind):
    here = torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: here)
    relaunch_if_needed(1, kind, ARGUMENTS)
    with pytest.raises(UserError, match=f"--device {kind}: .* one process.*--gpus"):
        relaunch_if_needed(2, kind, ARGUMENTS)
    launched(monkeypatch, 1)
    relaunch_if_needed(1, kind, ARGUMENTS)
    assert distributed.start(kind, 1, 60) == distributed.Processes(0, 1, here)
    for workers in ({}, {"LOCAL_WORLD_SIZE": "1"}):  # two on one machine; one on each of two
        launched(monkeypatch, 2, **workers)
        with pytest.raises(UserError, match=f"--device {kind}: .* one process.*torchrun"):
            relaunch_if_needed(1, kind, ARGUMENTS)
    assert exec_ == []


def test_gpus_does_not_cut_a_job_of_several_machines_into_parts(exec_, monkeypatch):
    launched(monkeypatch, 2, LOCAL_WORLD_SIZE="1")  # torchrun --nnodes 2 --nproc-per-node 1
    with pytest.raises(UserError, match="--gpus 4: the launcher started 2"):
        relaunch_if_needed(4, "cpu", ARGUMENTS)
    assert exec_ == []


def threads(setting: int):
    distributed.start("cpu", setting, 60)
    return torch.get_num_threads()


def test_threads_are_shared_between_the_processes():
    cores = len(os.sched_getaffinity(0))
    assert forked.run(threads, 0, ranks=2) == [max(1, cores // 2)] * 2
    assert forked.run(threads, 3) == [3]
    assert forked.run(threads, 0) == [cores]
