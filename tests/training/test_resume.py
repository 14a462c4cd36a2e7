"""A run that was stopped and resumed ends bit by bit where the uninterrupted one does."""

import itertools
import json
import shutil

import forked
import pytest
import torch
from conftest import metrics, state_of, trained
from torch import nn

import data.sample
import train_baseline
import train_byol
from byol.byol import BYOL
from data.images import Images

FLAGS = ["--save-every", "4", "--quiet"]


class Dropped(BYOL):
    """BYOL with randomness of its own in the forward pass."""

    def forward(self, view1, view2):
        return super().forward(nn.functional.dropout(view1), nn.functional.dropout(view2))


def train(recipe, out, *flags, method=BYOL):
    return train_byol.main(method, ["--recipe", recipe, "--out", str(out), *FLAGS, *flags])


@pytest.fixture
def whole(sample, recipe, tmp_path):
    """The uninterrupted run of 10 steps, 5 an epoch."""
    train(recipe, tmp_path / "whole", method=Dropped)
    return tmp_path / "whole"


@pytest.mark.parametrize("stop", [1, 2, 5, 6, 9])
def test_stop_and_resume_is_exact(whole, recipe, tmp_path, stop):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", str(stop), method=Dropped)
    assert not (out / "result.json").exists() and not (out / "encoder.pt").exists()
    assert len(metrics(out)) == stop
    train(recipe, out, "--resume", method=Dropped)
    assert trained(out, 10) == trained(whole, 10)
    assert metrics(out) == metrics(whole)
    first, second = (torch.load(f / "encoder.pt", weights_only=True) for f in (out, whole))
    assert all(torch.equal(v, first["state_dict"][k]) for k, v in second["state_dict"].items())


def test_two_processes_resume_exactly(sample, recipe, tmp_path):
    whole, out, short = tmp_path / "whole", tmp_path / "run", ["--steps", "4"]
    forked.run(train, recipe, whole, *short, ranks=2)
    forked.run(train, recipe, out, *short, "--stop-after", "2", ranks=2)
    forked.run(train, recipe, out, *short, "--resume", ranks=2)
    assert trained(out, 4) == trained(whole, 4) and metrics(out) == metrics(whole)


def test_another_number_of_processes_goes_on_with_the_same_batches(sample, recipe, tmp_path):
    """Same images, same views; float32 sums in another order."""
    reference, out = tmp_path / "reference", tmp_path / "run"
    short = ["--steps", "4"]
    train(recipe, reference, *short)
    forked.run(train, recipe, out, *short, "--stop-after", "2", ranks=2)
    train(recipe, out, *short, "--resume")
    rows, expected = metrics(out), metrics(reference)
    assert [r["step"] for r in rows] == list(range(4))
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in expected], rel=2e-3)


@pytest.mark.parametrize("name", ["lars", "sgd", "bf16", "fp16", "accumulate", "probe"])
def test_every_kind_of_state_resumes(sample, recipe, tmp_path, name):
    flags = {"lars": ["--optimizer", "lars", "--lr", "0.5"], "sgd": ["--optimizer", "sgd"],
             "bf16": ["--precision", "bf16"], "fp16": ["--precision", "fp16"],
             "accumulate": ["--accumulate", "2"], "probe": ["--online-probe"]}[name]  # fmt: skip
    flags += ["--steps", "4"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    train(recipe, whole, *flags)
    train(recipe, out, "--stop-after", "3", *flags)
    train(recipe, out, "--resume", *flags)
    assert trained(out, 4) == trained(whole, 4) and metrics(out) == metrics(whole)
    assert bool(state_of(out, 4)["scaler"]) is (name == "fp16")


def test_labelled_training_resumes(sample, recipe, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    for folder, flags in ((whole, ()), (out, ("--stop-after", "2")), (out, ("--resume",))):
        train_baseline.main(["--recipe", recipe, "--out", str(folder), "--quiet", *flags])
    assert trained(out, 5) == trained(whole, 5) and metrics(out) == metrics(whole)
    tops = [json.loads((f / "result.json").read_text())["top1"] for f in (out, whole)]
    assert tops[0] == tops[1]


def test_after_a_kill_the_steps_since_the_checkpoint_are_done_again(whole, recipe, tmp_path):
    """As if the process had died after step 10: of 4, 8 and 10 the last is gone."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("result.json", "encoder.pt", "checkpoints/step-00000010.pt"):
        (out / name).unlink()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss"')  # killed while writing
    train(recipe, out, "--resume", method=Dropped)
    assert trained(out, 10) == trained(whole, 10) and metrics(out) == metrics(whole)


def test_a_damaged_newest_checkpoint_resumes_from_the_one_before(whole, recipe, tmp_path, capsys):
    newest = whole / "checkpoints" / "step-00000010.pt"
    expected, rows = trained(whole, 10), metrics(whole)
    (whole / "result.json").unlink()
    newest.write_bytes(newest.read_bytes()[:-100])
    train(recipe, whole, "--resume", method=Dropped)
    assert "step-00000010.pt" in capsys.readouterr().err
    assert trained(whole, 10) == expected and metrics(whole) == rows


def refused(recipe, out, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        train(recipe, out, *flags)
    assert stop.value.code == 2


def tree(folder) -> dict:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
            for p in sorted(folder.rglob("*"))}  # fmt: skip


def test_changed_settings_are_an_error_that_lists_them(sample, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "4")
    before = {k: v for k, v in tree(out).items() if "lock" not in k}
    capsys.readouterr()
    refused(recipe, out, "--resume", "--lr", "0.01", "--byol.base-tau", "0.5", "--seed", "1")
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    for words in ("--lr 0.001 -> 0.01", "--byol.base-tau 0.99 -> 0.5", "--seed 0 -> 1"):
        assert words in text
    assert {k: v for k, v in tree(out).items() if "lock" not in k} == before
    # what does not shape the run may change
    train(recipe, out, "--resume", "--log-every", "3", "--stop-after", "5")


def test_a_finished_run_is_left_alone(whole, recipe, capsys):
    before = tree(whole)
    result = train(recipe, whole, "--resume", method=Dropped)
    assert result.pop("complete") and result == json.loads((whole / "result.json").read_text())
    assert tree(whole) == before


def test_a_finished_run_of_other_settings_is_refused(whole, recipe, capsys):
    before = tree(whole)
    refused(recipe, whole, "--resume", "--seed", "3")
    text = capsys.readouterr().err
    assert "--seed 0 -> 3" in text and text.count("\n") == 1 and tree(whole) == before


def test_a_run_killed_between_its_last_checkpoint_and_its_result_finishes(whole, recipe):
    result = json.loads((whole / "result.json").read_text())
    for name in ("result.json", "encoder.pt"):
        (whole / name).unlink()
    again = train(recipe, whole, "--resume", method=Dropped)
    assert (whole / "encoder.pt").exists()
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    assert again == json.loads((whole / "result.json").read_text())


def test_the_time_before_a_stop_counts(sample, recipe, tmp_path, monkeypatch):
    clock = itertools.count(step=1000)  # seconds a look
    monkeypatch.setattr("training.session.time.perf_counter", lambda: float(next(clock)))
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "5")
    (newest,) = (out / "checkpoints").glob("step-*5.pt")
    before = torch.load(newest, weights_only=True)["seconds"]
    assert before >= 1000
    monkeypatch.undo()
    monkeypatch.setattr(data.sample, "load", lambda root, config: sample)
    assert train(recipe, out, "--resume")["seconds"] >= before


def test_other_data_under_the_same_settings_is_an_error(whole, recipe, capsys, monkeypatch):
    (whole / "result.json").unlink()
    monkeypatch.setattr(Images, "__len__", lambda self: 300)
    with pytest.raises(SystemExit) as stop:
        train(recipe, whole, "--resume", method=Dropped)
    assert stop.value.code == 2 and "images 320 -> 300" in capsys.readouterr().err


def test_resume_without_any_checkpoint_starts_afresh(whole, recipe, tmp_path):
    train(recipe, tmp_path / "new", "--resume", method=Dropped)
    assert trained(tmp_path / "new", 10) == trained(whole, 10)


def test_all_checkpoints_damaged_is_an_error_and_no_fresh_start(sample, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "8")
    for path in (out / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    capsys.readouterr()
    refused(recipe, out, "--resume")
    text = capsys.readouterr().err
    assert "step-00000004.pt" in text and "step-00000008.pt" in text and "error:" in text
    assert len(metrics(out)) == 8


def test_resume_from_a_named_file(sample, recipe, tmp_path, capsys):
    out, other = tmp_path / "run", tmp_path / "other"
    train(recipe, out)
    path = out / "checkpoints" / "step-00000008.pt"
    train(recipe, other, "--resume", str(path))
    assert trained(other, 10) == trained(out, 10)

    capsys.readouterr()
    refused(recipe, tmp_path / "new", "--resume", "missing.pt")
    assert "missing.pt" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    refused(recipe, tmp_path / "new2", "--resume", str(path))
    assert str(path) in capsys.readouterr().err


def test_a_checkpoint_of_another_method_or_network(sample, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "4")
    path = str(out / "checkpoints" / "step-00000004.pt")
    from variants.simsiam import SimSiam

    with pytest.raises(SystemExit):
        train(recipe, tmp_path / "a", "--resume", path, method=SimSiam)
    assert "not a checkpoint of simsiam" in capsys.readouterr().err
    refused(recipe, tmp_path / "b", "--resume", path, "--width", "0.25", "--stem", "stl")
    assert "--width 0.125 -> 0.25" in capsys.readouterr().err


def test_tau_and_rate_of_the_resumed_step(whole, recipe, tmp_path):
    import math

    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "6", method=Dropped)
    train(recipe, out, "--resume", "--stop-after", "7", method=Dropped)
    row = metrics(out)[6]
    assert row["tau"] == pytest.approx(1 - 0.01 * (math.cos(math.pi * 0.6) + 1) / 2)
    assert row["lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 5 / 9)) / 2)
