"""Signals and non-finite values in real processes."""

import os
import signal
import time

import forked
import pytest
import torch
import torch.distributed as dist
from conftest import metrics, trained

import train_baseline
import train_byol
from baseline.baseline import Baseline
from byol.byol import BYOL
from core.errors import RunError
from training import stopping
from training.checkpoints import Checkpoints
from training.distributed import SINGLE
from training.resume import newest_valid
from training.stopping import Watch

STEPS = 30


def train(recipe, out, *flags, method=BYOL):
    flags = ["--recipe", recipe, "--out", str(out), "--steps", str(STEPS), "--save-every", "0",
             *flags]  # fmt: skip
    return train_byol.main(method, flags)


def rows(out) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture
def whole(sample, recipe, tmp_path):
    train(recipe, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_S1_S5_a_signal_saves_at_the_step_and_the_resume_is_exact(whole, recipe, tmp_path, number):
    out = tmp_path / "run"
    child = forked.Children(train, recipe, out)
    child.until(lambda: rows(out) >= 3)
    os.kill(child.pids[0], number)
    outcome = child.wait()[0]
    assert outcome.code == 75, outcome
    done = rows(out)
    assert 3 <= done < STEPS and "go on with --resume" in outcome.output
    assert [p.name for p in Checkpoints(out / "checkpoints", 0).list()] == [f"step-{done:08d}.pt"]
    forked.run(train, recipe, out, "--resume")
    assert trained(out, STEPS) == trained(whole, STEPS) and metrics(out) == metrics(whole)


@pytest.mark.parametrize("rank", [0, 1])
def test_S3_a_signal_to_one_rank_stops_both_at_the_same_step(sample, recipe, tmp_path, rank):
    out = tmp_path / "run"
    children = forked.Children(train, recipe, out, ranks=2)
    children.until(lambda: rows(out) >= 1)
    os.kill(children.pids[rank], signal.SIGTERM)
    assert [o.code for o in children.wait()] == [75, 75]
    done = rows(out)
    assert [p.name for p in Checkpoints(out / "checkpoints", 0).list()] == [f"step-{done:08d}.pt"]


def test_S6_sigusr1_saves_and_goes_on(sample, recipe, tmp_path):
    out = tmp_path / "run"
    child = forked.Children(train, recipe, out)
    child.until(lambda: rows(out) >= 3)
    os.kill(child.pids[0], signal.SIGUSR1)
    child.results()
    saved = [int(p.stem.split("-")[1]) for p in Checkpoints(out / "checkpoints", 0).list()]
    assert len(saved) == 2 and 3 <= saved[0] < saved[1] == STEPS


class Slow(BYOL):
    """A step that takes a minute."""

    def after_step(self, progress):
        if progress > 0.1:
            time.sleep(60)
        return super().after_step(progress)


def test_S5_a_second_signal_ends_at_once(sample, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "SAME", 0.05)
    out = tmp_path / "run"
    child = forked.Children(lambda: train(recipe, out, "--save-every", "2", method=Slow), limit=20)
    child.until((out / "checkpoints" / "step-00000004.pt").exists)
    begun = time.monotonic()
    for _ in range(2):
        os.kill(child.pids[0], signal.SIGTERM)
        time.sleep(0.1)
    assert child.wait()[0].code == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 5
    assert newest_valid(Checkpoints(out / "checkpoints", 0))["step"] == 4


def test_R14_a_kill_at_any_time_resumes_exactly(whole, recipe, tmp_path):
    out, kills = tmp_path / "run", 0
    for seen in (2, 9, 17, 23):
        child = forked.Children(train, recipe, out, "--resume", "--save-every", "3")
        child.until(lambda seen=seen: rows(out) >= seen)
        os.kill(child.pids[0], signal.SIGKILL)
        kills += child.wait()[0].code == -signal.SIGKILL
    assert kills == 4
    forked.run(train, recipe, out, "--resume", "--save-every", "3")
    assert trained(out, STEPS) == trained(whole, STEPS) and metrics(out) == metrics(whole)


class Poisoned(BYOL):
    """Images become NaN in step 3, on the last rank only."""

    calls = 0

    def forward(self, *views):
        last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
        if self.calls == 3 and last:
            views = (views[0] * float("nan"), views[1])
        self.calls += 1
        return super().forward(*views)


@pytest.mark.parametrize("batch_norm", ["sync", "local"])
def test_N1_nan_on_one_rank_stops_both(sample, recipe, tmp_path, batch_norm):
    out = tmp_path / "run"
    flags = ["--save-every", "1", "--batch-norm", batch_norm]
    children = forked.Children(lambda: train(recipe, out, *flags, method=Poisoned), ranks=2)
    outcomes = children.wait()
    assert [o.code for o in outcomes] == [1, 1], outcomes
    assert "not finite at step 3" in outcomes[0].output and "Traceback" not in outcomes[0].output
    newest = newest_valid(Checkpoints(out / "checkpoints", 0))
    assert newest["step"] == 3
    values = [v for v in newest["model"].values() if v.is_floating_point()]
    assert all(torch.isfinite(v).all() for v in values)


def test_N1_nan_stops_labelled_training_too(sample, recipe, tmp_path, capsys, monkeypatch):
    calls, honest = [], Baseline.forward

    def forward(self, view):
        calls.append(view)
        return honest(self, view * float("nan") if len(calls) == 4 else view)

    monkeypatch.setattr(Baseline, "forward", forward)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train_baseline.main(["--recipe", recipe, "--out", str(out), "--save-every", "1"])
    assert stop.value.code == 1 and "not finite at step 3" in capsys.readouterr().err
    assert newest_valid(Checkpoints(out / "checkpoints", 0))["step"] == 3


class BadGradient(BYOL):
    """A finite loss whose gradient is NaN in step 5."""

    calls = 0

    def loss(self, outputs):
        loss, logs = super().loss(outputs)
        self.calls += 1
        if self.calls == 6:
            loss.register_hook(lambda grad: grad * float("nan"))
        return loss, logs


def test_N2_a_nan_gradient_with_a_finite_loss_is_never_saved(sample, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train(recipe, out, "--save-every", "1", method=BadGradient)
    assert stop.value.code == 1 and "not finite at step 5" in capsys.readouterr().err
    assert newest_valid(Checkpoints(out / "checkpoints", 0))["step"] == 5


class Broken(BYOL):
    """An exception on the last rank in step 1."""

    calls = 0

    def forward(self, *views):
        self.calls += 1
        if self.calls == 2 and dist.get_rank() == 1:
            raise RuntimeError("the root cause")
        return super().forward(*views)


def test_S9_an_exception_on_one_rank_ends_that_rank_with_its_cause(sample, recipe, tmp_path):
    out = tmp_path / "run"
    flags = ["--dist-timeout", "5"]
    children = forked.Children(lambda: train(recipe, out, *flags, method=Broken), ranks=2)
    outcomes = children.wait()
    assert all(o.code not in (0, 75) for o in outcomes)
    assert outcomes[1].output.count("RuntimeError: the root cause") == 1


class Step:
    applied, last, index = True, False, 0

    def __init__(self, loss, index=0):
        self.loss, self.index = torch.tensor(loss), index


def test_the_finite_flag_is_kept_until_it_is_read():
    model = torch.nn.Linear(1, 1)
    watch = Watch(SINGLE, check_every=3)
    watch.look(Step(1.0, 0), model)
    watch.look(Step(float("inf"), 1), model)  # not read yet
    watch.look(Step(1.0, 2), model)
    with pytest.raises(RunError, match="step 3"):
        watch.look(Step(1.0, 3), model)


def test_N3_a_state_of_the_optimizer_that_is_not_finite():
    """A squared gradient beyond float32: the weight would stand still from then on."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    (model(torch.ones(1, 1)).sum() * 1e25).backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(RunError, match="step 0"):
        Watch(SINGLE).look(Step(1.0, 0), model, optimizer, saving=True)


def test_an_empty_buffer_does_no_harm():
    model = torch.nn.Linear(1, 1)
    model.register_buffer("queue", torch.zeros(0, 8))
    Watch(SINGLE).look(Step(1.0, 0), model, saving=True)


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with Watch(SINGLE):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
