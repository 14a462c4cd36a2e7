"""Kills, signals and bad input, for every script.  Names: the cases of tests/cases.md.

Those marked `faults` run with `make test-faults`.
"""

import builtins
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import forked
import pytest
import torch
from conftest import TINY, metrics, state_of, stl10_files, trained
from launchers import TORCHRUN, equal, newest, rows, settings

import data.sample
import finetune
import linear_eval
import train_baseline
import train_byol
from byol.byol import BYOL
from core import files as module
from training import stopping
from training.checkpoints import Checkpoints
from training.method import learning_rate
from training.resume import newest_valid

faults = pytest.mark.faults
ROOT = Path(train_byol.__file__).parent
SCRIPTS = {"train_byol": train_byol, "train_baseline": train_baseline, "finetune": finetune}
OTHERS = [pytest.param(name, marks=faults) for name in ("train_baseline", "finetune")]
EVERY = pytest.mark.parametrize("script", ["train_byol", *OTHERS])
STEPS = 12


@pytest.fixture(scope="session")
def shared(subset, tmp_path_factory) -> Path:
    """A folder with the recipe, a pretrained run, and the uninterrupted runs of each script."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tiny.toml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sample, "load", lambda root, config: subset)
        forked.run(train, folder, "train_byol", folder / "pretrained", "--steps", "2")
    return folder


def train(shared, script, out, *flags):
    """12 steps of a script, a checkpoint every 3, 5 steps an epoch."""
    ckpt = ["--ckpt", str(shared / "pretrained")] if script == "finetune" else []
    common = ["--recipe", str(shared / "tiny.toml"), "--out", str(out), "--quiet"]
    common += ["--steps", str(STEPS), "--save-every", "3"]
    return SCRIPTS[script].main(argv=[*common, *ckpt, *flags])


def whole(shared, script, *flags, ranks=1) -> Path:
    """The uninterrupted run, made when it is first asked for."""
    out = shared / "-".join([script, *flags, str(ranks)])
    if not out.exists():
        forked.run(train, shared, script, out, *flags, ranks=ranks)
    return out


def same(shared, script, out, *flags, ranks=1, steps=STEPS) -> bool:
    """Whether `out` ended where the uninterrupted run did: state, metrics, result."""
    expected = whole(shared, script, *flags, ranks=ranks)
    results = [json.loads((f / "result.json").read_text()) for f in (out, expected)]
    times = ("seconds", "warnings")
    results = [{k: v for k, v in r.items() if k not in times} for r in results]
    assert trained(out, steps) == trained(expected, steps)
    assert metrics(out) == metrics(expected)
    assert results[0] == results[1]
    return not [p for p in out.rglob(".*.tmp")]


# Resume


@faults
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stop", [1, 2, 7, 5, 6, STEPS])
@pytest.mark.parametrize("script", ["train_baseline", "finetune"])
def test_R1_R12_labelled_training_resumes_exactly(sample, shared, tmp_path, script, stop, ranks):
    out = tmp_path / "run"
    forked.run(train, shared, script, out, "--stop-after", str(stop), ranks=ranks)
    for name in ("result.json", "encoder.pt", "classifier.pt"):
        (out / name).unlink(missing_ok=True)
    forked.run(train, shared, script, out, "--resume", ranks=ranks)
    assert same(shared, script, out, ranks=ranks)


@faults
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stop", [1, 2, 7, 5, 6, STEPS])
@pytest.mark.parametrize("script", SCRIPTS)
def test_R1_R6_R19_fp16_resumes_with_its_scaler(sample, shared, tmp_path, script, stop, ranks):
    out, flags = tmp_path / "run", ("--precision", "fp16", "--crop-size", "8")
    forked.run(train, shared, script, out, "--stop-after", str(stop), *flags, ranks=ranks)
    for name in ("result.json", "encoder.pt", "classifier.pt"):
        (out / name).unlink(missing_ok=True)
    forked.run(train, shared, script, out, "--resume", *flags, ranks=ranks)
    assert same(shared, script, out, *flags, ranks=ranks) and state_of(out, STEPS)["scaler"]


@pytest.mark.parametrize("script", ["train_baseline", "finetune"])
def test_R16_changed_settings_of_labelled_training(sample, shared, tmp_path, script):
    out, lr = tmp_path / "run", ("--lr", "0.05")
    forked.run(train, shared, script, out, "--stop-after", "4")
    refused = forked.Children(train, shared, script, out, "--resume", *lr).wait()[0]
    assert refused.code == 2 and "--lr 0.1 -> 0.05" in refused.output, refused
    forked.run(train, shared, script, out, "--resume", "--override", *lr)
    assert json.loads((out / "config.json").read_text())["config"]["optim"]["lr"] == 0.05
    assert len(metrics(out)) == STEPS


@EVERY
def test_R14_ten_kills_at_random_moments(sample, shared, tmp_path, script):
    out, rng, kills = tmp_path / "run", random.Random(5), 0
    while kills < 10:
        child = forked.Children(train, shared, script, out, "--resume")
        time.sleep(rng.uniform(0, 0.5))
        os.kill(child.pids[0], signal.SIGKILL)
        if child.wait()[0].code == 0:  # it was faster: once more from the last step but some
            (out / "result.json").unlink()
            newest = Checkpoints(out / "checkpoints", 0).list()[-1]
            newest.unlink()
        else:
            kills += 1
    forked.run(train, shared, script, out, "--resume")
    assert same(shared, script, out)


# Saving


class Deadly:
    """A file that takes `share` of what is written to it and then kills the process."""

    def __init__(self, file, share: float) -> None:
        self.file, self.share = file, share

    def __enter__(self):
        return self

    def __exit__(self, *error):
        raise AssertionError("it lives")

    def write(self, content):
        with self.file as file:
            file.write(content[: int(len(content) * self.share)])
        os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(share: float) -> None:
    """The second checkpoint's file gets `share` of its bytes."""
    calls = []

    def deadly(path, mode="r", **keywords):
        file = builtins.open(path, mode, **keywords)
        if not str(path).endswith(".pt.tmp") or "encoder" in str(path):
            return file
        calls.append(path)
        return Deadly(file, share) if len(calls) == 2 else file

    module.open = deadly


def die_before(function: str) -> None:
    """Killed when the second checkpoint is about to be renamed, or an old one to be removed."""
    calls, honest = [], {"replace": os.replace, "unlink": Path.unlink}[function]

    def deadly(path, *args, **keywords):
        if str(path).endswith(".pt.tmp" if function == "replace" else ".pt") and "step-" in str(
            path
        ):
            calls.append(path)
            if len(calls) == (2 if function == "replace" else 1):
                os.kill(os.getpid(), signal.SIGKILL)
        return honest(path, *args, **keywords)

    setattr(os if function == "replace" else Path, function, deadly)


def killed_in_a_save(shared, script, out, prepare, argument) -> list[str]:
    """The checkpoints that are left, newest last, and what stands beside them."""

    def dying():
        prepare(argument)
        train(shared, script, out)

    child = forked.Children(dying).wait()[0]
    assert child.code == -signal.SIGKILL, child
    return sorted(p.name for p in (out / "checkpoints").iterdir() if p.suffix != ".sha256")


@pytest.mark.parametrize("share", [0, 0.5, 1])
@EVERY
def test_C1_a_kill_while_a_checkpoint_is_written(sample, shared, tmp_path, script, share):
    out = tmp_path / "run"
    left = killed_in_a_save(shared, script, out, die_while_writing, share)
    assert left == [".step-00000006.pt.tmp", "step-00000003.pt"]
    assert state_of(out, 3)["step"] == 3
    forked.run(train, shared, script, out, "--resume")
    assert same(shared, script, out)


@EVERY
def test_C2_a_kill_before_the_rename(sample, shared, tmp_path, script):
    out = tmp_path / "run"
    left = killed_in_a_save(shared, script, out, die_before, "replace")
    assert left == [".step-00000006.pt.tmp", "step-00000003.pt"]
    forked.run(train, shared, script, out, "--resume")
    assert same(shared, script, out)


@EVERY
def test_C3_a_kill_before_old_checkpoints_go(sample, shared, tmp_path, script):
    out = tmp_path / "run"
    left = killed_in_a_save(shared, script, out, die_before, "unlink")
    assert left == [f"step-{k:08d}.pt" for k in (3, 6, 9)]
    forked.run(train, shared, script, out, "--resume")
    assert same(shared, script, out)
    assert [p.name[-5:] for p in Checkpoints(out / "checkpoints", 0).list()] == ["09.pt", "12.pt"]


def on_a_full_disk(shared, script, out):
    """No checkpoint can be flushed to the disk from the third on."""
    honest = os.fsync

    def full(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        if path.endswith(".pt.tmp") and len(list(out.glob("checkpoints/*.pt"))) == 2:
            raise OSError(28, "No space left on device")
        honest(number)

    os.fsync = full
    train(shared, script, out, "--save-every", "1")


@EVERY
def test_C15_a_full_disk_stops_the_run_with_one_line(sample, shared, tmp_path, script):
    out = tmp_path / "run"
    outcome = forked.Children(on_a_full_disk, shared, script, out).wait()[0]
    told = outcome.output.splitlines()
    assert outcome.code == 1 and len(told) == 1, outcome
    assert told[0].startswith("error: ") and "No space left" in told[0] and "needed" in told[0]
    assert not list(out.rglob(".*.tmp"))
    forked.run(train, shared, script, out, "--resume", "--save-every", "1")
    assert same(shared, script, out)


# Damage


def cut(keep):
    return lambda data: data[: keep(len(data))]


def flip(where):
    def change(data):
        place = where(data)
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return change


DAMAGE = {
    "C5_empty": cut(lambda n: 0),
    "C5_half": cut(lambda n: n // 2),
    "C5_tail": cut(lambda n: n - 100),
    "C6_tensor": flip(lambda data: len(data) // 2),
    "C7_pickle": flip(lambda data: data.index(b"bn1.weight")),
}


@EVERY
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_C5_C6_C7_training_falls_back_to_the_checkpoint_before(
    sample, shared, tmp_path, script, damage
):
    out = tmp_path / "run"
    shutil.copytree(whole(shared, script), out)
    newest = out / "checkpoints" / f"step-{STEPS:08d}.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    for name in ("result.json", "encoder.pt", "classifier.pt"):
        (out / name).unlink(missing_ok=True)
    child = forked.Children(train, shared, script, out, "--resume").wait()[0]
    assert child.code == 0 and f"{newest.name}: its checksum does not match" in child.output
    assert same(shared, script, out)


@EVERY
def test_C8_all_checkpoints_damaged_is_no_fresh_start(sample, shared, tmp_path, script):
    out = tmp_path / "run"
    shutil.copytree(whole(shared, script), out)
    (out / "result.json").unlink()
    for path in Checkpoints(out / "checkpoints", 0).list():
        path.write_bytes(path.read_bytes()[:-1])
    before = metrics(out)
    child = forked.Children(train, shared, script, out, "--resume").wait()[0]
    assert child.code == 2 and metrics(out) == before
    last = child.output.splitlines()[-1]
    words = "no valid checkpoint", "step-00000009.pt", "step-00000012.pt"
    assert all(word in last for word in words)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("script", [linear_eval, finetune])
@pytest.mark.parametrize("file", ["encoder.pt", "checkpoints/step-00000002.pt"])
def test_C5_C6_C7_damaged_weights_are_not_evaluated(
    sample, shared, tmp_path, capsys, script, damage, file
):
    path = tmp_path / "damaged" / file
    shutil.copytree(shared / "pretrained", tmp_path / "damaged")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SystemExit) as stop:
        script.main(["--ckpt", str(path), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.startswith(f"error: --ckpt {path}: "), text
    assert text.count("\n") == 1 and not (tmp_path / "out").exists()


# Signals


@faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("script", ["train_baseline", "finetune"])
def test_S1_S5_labelled_training_saves_and_stops(sample, shared, tmp_path, script, number):
    out = tmp_path / "run"
    child = forked.Children(train, shared, script, out)
    child.until(lambda: rows(out) >= 2)
    os.kill(child.pids[0], number)
    assert child.wait()[0].code == 75
    forked.run(train, shared, script, out, "--resume")
    assert same(shared, script, out)


def slow_save(shared, out):
    """Each flush to the disk takes half a second."""
    honest = os.fsync
    os.fsync = lambda number: (time.sleep(0.5), honest(number))[1]
    train(shared, "train_byol", out, "--save-every", "4")


def test_S4_a_signal_during_a_save_lets_it_complete(sample, shared, tmp_path):
    out = tmp_path / "run"
    child = forked.Children(slow_save, shared, out)
    child.until((out / "checkpoints" / ".step-00000004.pt.tmp").exists)
    os.kill(child.pids[0], signal.SIGTERM)
    assert child.wait()[0].code == 75
    steps = [p.name for p in Checkpoints(out / "checkpoints", 0).list()]
    assert steps == ["step-00000004.pt", "step-00000005.pt"]
    forked.run(train, shared, "train_byol", out, "--resume")
    assert same(shared, "train_byol", out)


def test_S4_a_second_signal_during_a_save_leaves_the_old_file(
    sample, shared, tmp_path, monkeypatch
):
    monkeypatch.setattr(stopping, "SAME", 0.01)
    out = tmp_path / "run"
    child = forked.Children(slow_save, shared, out)
    child.until((out / "checkpoints" / ".step-00000008.pt.tmp").exists)
    for _ in range(2):
        os.kill(child.pids[0], signal.SIGTERM)
        time.sleep(0.05)
    assert child.wait()[0].code == 128 + signal.SIGTERM
    assert newest_valid(Checkpoints(out / "checkpoints", 0))["step"] == 4
    forked.run(train, shared, "train_byol", out, "--resume")
    assert same(shared, "train_byol", out)


def evaluate(shared, out, ready):
    """A linear evaluation that touches `ready` and would then take a minute."""

    def wait(*args):
        ready.touch()
        time.sleep(60)

    linear_eval.evaluate = wait
    linear_eval.main(["--ckpt", str(shared / "pretrained"), "--out", str(out), "--threads", "1"])


def test_S5_an_evaluation_is_interrupted_without_a_traceback(sample, shared, tmp_path):
    child = forked.Children(evaluate, shared, tmp_path / "out", tmp_path / "ready")
    child.until((tmp_path / "ready").exists)
    os.kill(child.pids[0], signal.SIGINT)
    outcome = child.wait()[0]
    assert outcome.code == 130 and "Traceback" not in outcome.output, outcome


# Two runs, one folder


@EVERY
def test_S12_a_second_run_in_the_same_folder_is_refused(sample, shared, tmp_path, script):
    out = tmp_path / "run"
    first = forked.Children(train, shared, script, out, "--steps", "3000", "--save-every", "3000")
    first.until(lambda: rows(out) >= 1)
    for flags in (["--resume"], ["--overwrite"]):
        second = forked.Children(train, shared, script, out, "--steps", "3000", *flags).wait()[0]
        assert second.code == 2, second
        assert f"in use by process {first.pids[0]}" in second.output.splitlines()[-1]
    os.kill(first.pids[0], signal.SIGKILL)
    assert first.wait()[0].code == -signal.SIGKILL
    forked.run(train, shared, script, out, "--overwrite", "--steps", "1")


@pytest.mark.parametrize("script", ["train_byol", "train_baseline", "finetune", "linear_eval"])
def test_S13_a_finished_run_is_not_touched(sample, shared, tmp_path, capsys, script):
    out = tmp_path / "run"
    shutil.copytree(whole(shared, "train_baseline"), out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as stop:
        if script == "linear_eval":
            linear_eval.main(["--ckpt", str(shared / "pretrained"), "--out", str(out)])
        else:
            train(shared, script, out)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "holds a run" in text and text.count("\n") == 1
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


# Values that are not finite


class Spoilt(BYOL):
    """Something is not finite in step 5."""

    calls, what = 0, ""

    def forward(self, *views):
        self.calls += 1
        if self.calls == 6 and self.what == "weights":
            with torch.no_grad():
                self.projector[0].weight[0, 0] = float("nan")
        outputs = super().forward(*views)
        if self.calls == 6 and self.what == "target":
            outputs["target"][0, 0] = float("nan")
        return outputs

    def loss(self, outputs):
        loss, logs = super().loss(outputs)
        return (loss * float("inf") if self.calls == 6 and self.what == "loss" else loss), logs


@pytest.mark.parametrize("check", ["1", "4"])
@pytest.mark.parametrize("what", ["weights", "target", "loss"])
def test_N1_N2_N3_no_checkpoint_holds_what_is_not_finite(
    sample, recipe, tmp_path, capsys, monkeypatch, what, check
):
    monkeypatch.setattr(Spoilt, "what", what)
    out = tmp_path / "run"
    flags = ["--recipe", recipe, "--out", str(out), "--save-every", "2", "--check-every", check]
    with pytest.raises(SystemExit) as stop:
        train_byol.main(Spoilt, flags)
    text = capsys.readouterr().err
    assert stop.value.code == 1 and "not finite at step 5" in text and text.count("\n") == 1
    assert [p.name for p in Checkpoints(out / "checkpoints", 0).list()] == [
        "step-00000002.pt", "step-00000004.pt"]  # fmt: skip


def test_N4_steps_that_fp16_skips_change_only_the_scale(sample, recipe, tmp_path):
    """The first scale is too large for this loss: it is halved until the gradients fit."""
    out = tmp_path / "run"

    class Large(BYOL):
        def loss(self, outputs):
            loss, logs = super().loss(outputs)
            return loss * 30, logs

    flags = ["--recipe", recipe, "--out", str(out), "--precision", "fp16", "--crop-size", "8"]
    train_byol.main(Large, [*flags, "--quiet", "--save-every", "1", "--keep", "10"])
    first, second = state_of(out, 1), state_of(out, 2)
    assert first["scaler"]["scale"] == 2 * second["scaler"]["scale"] == 2**15
    weights = {k for k in first["model"] if "running" not in k and "tracked" not in k}
    assert all(torch.equal(first["model"][k], second["model"][k]) for k in weights)
    assert not first["optimizer"]["state"]
    rows = metrics(out)
    assert ["tau" in row for row in rows[:2]] == [False, False] and "tau" in rows[-1]
    assert [row["lr"] for row in rows] == [learning_rate(1e-3, k, 5, 10) for k in range(10)]


def test_N4_a_scaler_that_only_skips_ends_the_run(sample, recipe, tmp_path, capsys):
    class Hopeless(BYOL):
        def loss(self, outputs):
            loss, logs = super().loss(outputs)
            return loss * float("nan"), logs

    flags = ["--recipe", recipe, "--out", str(tmp_path / "run"), "--precision", "fp16"]
    with pytest.raises(SystemExit) as stop:
        train_byol.main(Hopeless, [*flags, "--crop-size", "8", "--steps", "99", "--quiet"])
    assert stop.value.code == 1 and "not finite at step 49" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer, lr", [("lars", "1e6"), ("sgd", "1e12")])
def test_N5_a_rate_far_too_high_ends_the_run(sample, recipe, tmp_path, capsys, optimizer, lr):
    flags = ["--recipe", recipe, "--out", str(tmp_path / "run"), "--optimizer", optimizer]
    with pytest.raises(SystemExit) as stop:
        train_byol.main(argv=[*flags, "--lr", lr, "--steps", "40", "--quiet"])
    text = capsys.readouterr().err
    assert stop.value.code == 1 and "lower --lr" in text and text.count("\n") == 1


def test_N5_a_rate_that_batch_norm_survives_is_told_as_a_collapse(sample, recipe, tmp_path, capsys):
    flags = ["--recipe", recipe, "--out", str(tmp_path / "run"), "--optimizer", "sgd"]
    train_byol.main(argv=[*flags, "--lr", "1e6", "--steps", "60", "--knn-every", "20", "--quiet"])
    assert "all images get nearly the same" in capsys.readouterr().err


# Data


WRONG_DATA = {
    "D1_one_byte_less": ("train_X.bin", lambda data: data[:-1]),
    "D1_one_image_less": ("train_X.bin", lambda data: data[: -3 * 96 * 96]),
    "D1_empty": ("test_X.bin", lambda data: b""),
    "D1_one_byte_more": ("unlabeled_X.bin", lambda data: data + b"\0"),
    "D2_label_0": ("train_y.bin", lambda data: b"\0" + data[1:]),
    "D2_label_11": ("test_y.bin", lambda data: data[:-1] + b"\x0b"),
    "D2_fewer_labels": ("train_y.bin", lambda data: data[:-1]),
    "D2_more_labels": ("train_y.bin", lambda data: data + b"\1"),
    "D2_index_5000": ("fold_indices.txt", lambda data: b"5000 " + data),
}


@pytest.mark.parametrize("wrong", WRONG_DATA)
@pytest.mark.parametrize("script", [*SCRIPTS, "linear_eval"])
def test_D1_D2_wrong_data_is_refused_by_each_script(shared, tmp_path, capsys, script, wrong):
    name, change = WRONG_DATA[wrong]
    path = stl10_files(tmp_path) / name
    path.write_bytes(change(path.read_bytes()))
    flags = ["--dataset", "stl10", "--data-root", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        if script == "linear_eval":
            ckpt = ["--ckpt", str(shared / "pretrained"), "--out", str(tmp_path / "run")]
            linear_eval.main([*ckpt, *flags])
        else:
            train(shared, script, tmp_path / "run", *flags)
    text = capsys.readouterr().err
    if wrong in ("D2_fewer_labels", "D2_more_labels"):
        name = "train_X.bin"  # of two files that disagree, the one whose size does not fit
    assert stop.value.code == 2 and name in text and text.count("\n") == 1, text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_D8_too_few_images_are_refused_before_any_step(shared, tmp_path, capsys, script):
    """And so is a batch of 1, of which batch norm has no variance."""
    stl10_files(tmp_path)
    flags = ["--dataset", "stl10", "--data-root", str(tmp_path)]
    for batch, said in (("4", "there are only"), ("1", "at least 2")):
        out = tmp_path / batch
        with pytest.raises(SystemExit) as stop:
            train(shared, script, out, *flags, "--batch-size", batch)
        text = capsys.readouterr().err
        assert stop.value.code == 2 and f"--batch-size {batch}: " in text and said in text, text
        assert text.count("\n") == 1 and not out.exists()


# The environment


STALE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
         "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "1", "PET_NNODES": "3",
         "GROUP_RANK": "2", "TORCHELASTIC_RESTART_COUNT": "1"}  # fmt: skip
PARTIAL = [STALE, {"RANK": "1"}, {"WORLD_SIZE": "2", "MASTER_ADDR": "10.255.255.1"},
           {"TORCHELASTIC_RUN_ID": "none"},
           {"TORCHELASTIC_RUN_ID": "none", "RANK": "0"}]  # fmt: skip


def with_environment(shared, out, variables, *flags):
    os.environ |= variables
    train(shared, "train_byol", out, *flags)


def test_L4_a_stale_rank_does_not_hide_an_error(shared, tmp_path):
    flags = shared, tmp_path / "run", {"RANK": "abc"}, "--lr", "-1"
    outcome = forked.Children(with_environment, *flags).wait()[0]
    assert outcome.code == 2 and outcome.output.startswith("error: --lr"), outcome


@pytest.mark.parametrize("variables", PARTIAL)
def test_L4_stale_variables_of_a_launcher_do_not_matter(sample, shared, tmp_path, variables):
    forked.run(with_environment, shared, tmp_path / "run", variables)
    assert same(shared, "train_byol", tmp_path / "run")


# Real launchers


@faults
@pytest.mark.parametrize("spelling", [[*TORCHRUN, "train_byol.py"], ["train_byol.py", "--gpus", 2]])
def test_S2_a_signal_to_the_launcher_saves_and_stops_all(two, tmp_path, launch, spelling):
    out, recipe = tmp_path / "run", two / "tiny.toml"
    run = launch(*spelling, *settings(recipe, out))
    run.until(lambda: rows(out) >= 3)
    assert sorted(run.ranks()) == [0, 1]
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 1  # torchrun's code for every failure
    done = rows(out)
    assert 3 <= done < 40 and newest(out) == done
    again = launch(*spelling, *settings(recipe, out), "--resume")
    assert again.wait() == 0 and equal(out, two)


SLOWLY = """
import os, sys, time
sys.path.insert(0, {root!r})
from train_byol import main
honest = os.fsync
os.fsync = lambda number: (time.sleep(1.5), honest(number))
main()
"""


@faults
@pytest.mark.parametrize("to", ["rank 0", "rank 1", "all"])
def test_S2_S3_the_save_completes_whoever_is_told_to_stop(two, tmp_path, launch, to):
    """The others wait for rank 0: a launcher ends all as soon as one has left."""
    script, out = tmp_path / "slowly.py", tmp_path / "run"
    script.write_text(SLOWLY.format(root=str(ROOT)))
    flags = ["--save-every", "0", "--steps", "100000"]
    run = launch(*TORCHRUN, script, *settings(two / "tiny.toml", out), *flags)
    run.until(lambda: rows(out) >= 3 and len(run.ranks()) == 2)
    ranks = run.ranks()
    told = [ranks[int(to[-1])]] if to != "all" else [run.process.pid, *ranks.values()]
    for pid in told:
        os.kill(pid, signal.SIGTERM)
    assert run.wait() == 1 and newest(out) == rows(out)


@faults
def test_S5_ctrl_c_at_the_terminal_saves_and_stops(two, tmp_path, launch):
    """It reaches the launcher alone, whose ranks are in sessions of their own."""
    out = tmp_path / "run"
    run = launch("train_byol.py", "--gpus", 2, *settings(two / "tiny.toml", out))
    run.until(lambda: rows(out) >= 3 and len(run.ranks()) == 2)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == 1 and newest(out) == rows(out) < 40


@faults
def test_S6_sigusr1_to_all_processes_saves_and_goes_on(two, tmp_path, launch):
    """What Slurm's --signal=USR1 does; the launcher alone would die of it."""
    out = tmp_path / "run"
    flags = ["--save-every", "0", "--keep", "5"]
    run = launch("train_byol.py", "--gpus", 2, *settings(two / "tiny.toml", out), *flags)
    run.until(lambda: rows(out) >= 3 and len(run.ranks()) == 2)
    for pid in (run.process.pid, *run.ranks().values()):
        os.kill(pid, signal.SIGUSR1)
    assert run.wait() == 0 and equal(out, two)
    assert len(Checkpoints(out / "checkpoints", 0).list()) == 2


@faults
def test_S7_a_killed_rank_ends_the_job(two, tmp_path, launch):
    out = tmp_path / "run"
    run = launch(*TORCHRUN, "train_byol.py", *settings(two / "tiny.toml", out))
    run.until(lambda: rows(out) >= 7 and len(run.ranks()) == 2)
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.wait(30) == 1 and newest(out) >= 5
    assert run.log.read_text().count("Traceback") <= 1  # the launcher's own


@faults
def test_S7_a_killed_rank_is_restarted_from_the_checkpoint(two, tmp_path, launch):
    out = tmp_path / "run"
    flags = ["--max-restarts", 1, "train_byol.py"]
    run = launch(*TORCHRUN, *flags, *settings(two / "tiny.toml", out))
    run.until(lambda: rows(out) >= 7 and len(run.ranks()) == 2)
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.wait() == 0 and equal(out, two)


FORK = """
import sys
sys.path.insert(0, {root!r})
import torch.distributed as dist
from byol.byol import BYOL
from data.loader import Loader
from training.checkpoints import Checkpoints
from train_byol import main

def broken(owner, name, when):
    honest, calls = getattr(owner, name), []
    def call(*args, **keywords):
        calls.append(args)
        if when(len(calls)):
            raise RuntimeError("the root cause")
        return honest(*args, **keywords)
    setattr(owner, name, call)

on_rank_1 = lambda calls: calls == 7 and dist.get_rank() == 1
{which}
main(BYOL)
"""
BROKEN = {
    "step": 'broken(BYOL, "forward", on_rank_1)',
    "data": 'broken(Loader, "indices", on_rank_1)',
    "save": 'broken(Checkpoints, "save", lambda calls: calls == 2)',
}


@faults
@pytest.mark.parametrize("which", BROKEN)
def test_S9_an_exception_on_one_rank_ends_the_job_and_is_told_once(two, tmp_path, launch, which):
    script, out = tmp_path / "fork.py", tmp_path / "run"
    script.write_text(FORK.format(root=str(ROOT), which=BROKEN[which]))
    run = launch(*TORCHRUN, script, *settings(two / "tiny.toml", out))
    run.until(lambda: len(run.ranks()) == 2)
    assert run.wait(60) == 1
    text = run.log.read_text()
    assert text.count("RuntimeError: the root cause") == 1, text
    assert "Connection" not in text and newest(out) == 5


@faults
@pytest.mark.parametrize("spelling", [[*TORCHRUN, "train_byol.py"], ["train_byol.py", "--gpus", 2]])
def test_S10_no_rank_survives_its_launcher(two, tmp_path, launch, spelling):
    out = tmp_path / "run"
    run = launch(*spelling, *settings(two / "tiny.toml", out, steps=100000))
    run.until(lambda: rows(out) >= 1 and len(run.ranks()) == 2)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    run.gone(10)


@faults
def test_L1_L4_the_launcher_is_found_among_stale_variables(two, tmp_path, launch, monkeypatch):
    for name, value in STALE.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "run"
    run = launch("train_byol.py", "--gpus", 2, *settings(two / "tiny.toml", out))
    assert run.wait() == 0 and equal(out, two)


@faults
def test_L5_L6_two_launches_at_once_and_a_path_with_spaces(two, tmp_path, launch):
    """Neither the port nor the working folder nor quoting is in the way."""
    outs = [tmp_path / "a run", tmp_path / "another run"]
    runs = [
        launch("train_byol.py", "--gpus=2", *settings(two / "tiny.toml", out, steps=4))
        for out in outs
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert metrics(outs[0]) == metrics(outs[1])


# The list of cases


REQUIRED = [*(f"C{k}" for k in range(1, 14)), "C15", *(f"R{k}" for k in range(1, 20)),
            *(f"S{k}" for k in (1, 2, 3, 4, 5, 7, 9, 10, 12, 13)), "L1", "L2", "L3", "L4",
            "D1", "D2", "D8", *(f"N{k}" for k in range(1, 6)), "A1"]  # fmt: skip

CASE = re.compile(r"[CRSLDNA]\d+")


def test_each_case_is_in_the_list_and_has_a_test_of_its_name():
    lines = (ROOT / "tests/cases.md").read_text().splitlines()
    rows = [line for line in lines if line[:1] == "|"]
    promised = {c for row in rows for c in CASE.findall(row.split("|")[1])}
    code = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    names = re.findall(r"def test_(\w+)", code)
    tested = {word for name in names for word in name.split("_") if CASE.fullmatch(word)}
    assert tested == promised and promised >= set(REQUIRED)
