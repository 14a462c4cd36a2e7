"""A run that was stopped and resumed ends bit for bit where the uninterrupted one does."""

import itertools
import json
import shutil

import forked
import pytest
import torch
from conftest import metrics, state_of, trained
from torch import nn

import data.sample
import train_byol
from byol.byol import BYOL
from data.images import Images
from data.loader import Loader
from eval.trained import classifier_file
from training.checkpoints import Checkpoints, rejected, save_file

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


def ended(out) -> None:
    """As if the run had been killed between its last checkpoint and its result."""
    for name in ("result.json", "encoder.pt", "classifier.pt"):
        (out / name).unlink(missing_ok=True)


# first, second, middle, last of an epoch, first of the next, last of the run
STOPS = (1, 2, 8, 5, 6, 10)


@pytest.mark.parametrize("stop", STOPS)
def test_R1_R2_R3_R4_R5_R6_stop_and_resume_is_exact(whole, recipe, tmp_path, stop):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", str(stop), method=Dropped)
    assert len(metrics(out)) == stop
    assert (out / "encoder.pt").exists() is (out / "result.json").exists() is (stop == 10)
    ended(out)
    train(recipe, out, "--resume", method=Dropped)
    assert trained(out, 10) == trained(whole, 10)
    assert metrics(out) == metrics(whole)
    first, second = (torch.load(f / "encoder.pt", weights_only=True) for f in (out, whole))
    assert all(torch.equal(v, first["state_dict"][k]) for k, v in second["state_dict"].items())


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The uninterrupted run of two processes, made once."""
    return tmp_path_factory.mktemp("two") / "whole"


@pytest.mark.parametrize("stop", STOPS)
def test_R7_R8_R9_R10_R11_R12_two_processes_too(sample, recipe, tmp_path, together, stop):
    out = tmp_path / "run"
    if not together.exists():
        forked.run(train, recipe, together, ranks=2)
    forked.run(train, recipe, out, "--stop-after", str(stop), ranks=2)
    ended(out)
    forked.run(train, recipe, out, "--resume", ranks=2)
    assert trained(out, 10) == trained(together, 10) and metrics(out) == metrics(together)


def test_R13_batches_made_ahead_are_the_same(whole, recipe, tmp_path, monkeypatch, subset):
    """The loader is a function of the step: who asks for steps early and twice gets the same."""
    honest = Loader.batches

    def ahead(self, step):
        for later in (step + 1, step + 7):
            list(honest(self, later))
        return iter(list(honest(self, step)))

    monkeypatch.setattr(Loader, "batches", ahead)
    train(recipe, tmp_path / "run", "--stop-after", "3", method=Dropped)
    monkeypatch.undo()
    monkeypatch.setattr(data.sample, "load", lambda root, config: subset)
    train(recipe, tmp_path / "run", "--resume", method=Dropped)
    assert trained(tmp_path / "run", 10) == trained(whole, 10)


@pytest.mark.parametrize("first, second", [(2, 1), (1, 2)])
def test_R15_another_number_of_processes_goes_on_with_the_same_batches(
    sample, recipe, tmp_path, first, second, float64
):
    """Same images, same views, same weights: to 1e-9 in float64."""
    reference, out = tmp_path / "reference", tmp_path / "run"
    short = ["--steps", "4"]
    train(recipe, reference, *short)
    forked.run(train, recipe, out, *short, "--stop-after", "2", ranks=first)
    resumed = forked.Children(train, recipe, out, *short, "--resume", ranks=second).wait()
    assert f"going on with {second} processes after {first}" in resumed[0].output
    rows, expected = metrics(out), metrics(reference)
    assert [r["step"] for r in rows] == list(range(4))
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in expected], rel=1e-9)


@pytest.mark.parametrize("name", ["lars", "sgd", "bf16", "fp16", "accumulate", "probe"])
def test_R19_every_kind_of_state_resumes(sample, recipe, tmp_path, name):
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


def test_C17_after_a_kill_the_steps_since_the_checkpoint_are_done_again(whole, recipe, tmp_path):
    """As if the process had died after step 10: of 4, 8 and 10 the last is gone."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for name in ("result.json", "encoder.pt", "checkpoints/step-00000010.pt"):
        (out / name).unlink()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss"')  # killed while writing
    train(recipe, out, "--resume", method=Dropped)
    assert trained(out, 10) == trained(whole, 10) and metrics(out) == metrics(whole)


def test_C5_a_damaged_newest_checkpoint_resumes_from_the_one_before(
    whole, recipe, tmp_path, capsys
):
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


def test_R16_changed_settings_are_an_error_that_lists_them(sample, recipe, tmp_path, capsys):
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


def test_R17_a_finished_run_is_left_alone(whole, recipe, capsys):
    before = tree(whole)
    result = train(recipe, whole, "--resume", method=Dropped)
    assert result.pop("complete") and result == json.loads((whole / "result.json").read_text())
    assert tree(whole) == before


def test_R16_a_finished_run_of_other_settings_is_refused(whole, recipe, capsys):
    before = tree(whole)
    refused(recipe, whole, "--resume", "--seed", "3")
    text = capsys.readouterr().err
    assert "--seed 0 -> 3" in text and text.count("\n") == 1 and tree(whole) == before


def test_R16_an_option_that_is_newer_than_the_run_had_its_default(whole, recipe, capsys):
    config = json.loads((whole / "config.json").read_text())
    del config["config"]["byol"]["whiten"]
    (whole / "config.json").write_text(json.dumps(config))
    assert train(recipe, whole, "--resume")["complete"]
    refused(recipe, whole, "--resume", "--byol.whiten")
    assert "--byol.whiten False -> True" in capsys.readouterr().err


def test_a_run_killed_between_its_last_checkpoint_and_its_result_finishes(whole, recipe):
    result = json.loads((whole / "result.json").read_text())
    ended(whole)
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


def test_R16_other_data_under_the_same_settings_is_an_error(whole, recipe, capsys, monkeypatch):
    (whole / "result.json").unlink()
    monkeypatch.setattr(Images, "__len__", lambda self: 300)
    with pytest.raises(SystemExit) as stop:
        train(recipe, whole, "--resume", method=Dropped)
    assert stop.value.code == 2 and "images 320 -> 300" in capsys.readouterr().err


def test_resume_without_any_checkpoint_starts_afresh(whole, recipe, tmp_path):
    train(recipe, tmp_path / "new", "--resume", method=Dropped)
    assert trained(tmp_path / "new", 10) == trained(whole, 10)


def test_C8_all_checkpoints_damaged_is_an_error_and_no_fresh_start(
    sample, recipe, tmp_path, capsys
):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "8")
    for path in (out / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    capsys.readouterr()
    refused(recipe, out, "--resume")
    text = capsys.readouterr().err
    assert "step-00000004.pt" in text and "step-00000008.pt" in text and "error:" in text
    assert len(metrics(out)) == 8


def test_C9_resume_from_a_named_file(sample, recipe, tmp_path, capsys):
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


def test_C14_a_checkpoint_of_another_method_or_network(sample, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "4")
    path = str(out / "checkpoints" / "step-00000004.pt")
    from variants.simsiam import SimSiam

    with pytest.raises(SystemExit):
        train(recipe, tmp_path / "a", "--resume", path, method=SimSiam)
    assert "not a checkpoint of simsiam" in capsys.readouterr().err
    refused(recipe, tmp_path / "b", "--resume", path, "--width", "0.25", "--stem", "stl")
    assert "--width 0.125 -> 0.25" in capsys.readouterr().err


def test_R18_tau_and_rate_of_the_resumed_step(whole, recipe, tmp_path):
    import math

    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "6", method=Dropped)
    train(recipe, out, "--resume", "--stop-after", "7", method=Dropped)
    row = metrics(out)[6]
    assert row["tau"] == pytest.approx(1 - 0.01 * (math.cos(math.pi * 0.6) + 1) / 2)
    assert row["lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 1 / 5)) / 2)


def test_R16_override_goes_on_with_other_settings(sample, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "4", "--optimizer", "sgd", "--lr", "0.1")
    capsys.readouterr()
    flags = ["--lr", "0.2", "--momentum", "0.5", "--weight-decay", "0.01", "--byol.base-tau", "0.5"]
    train(recipe, out, "--resume", "--override", "--optimizer", "sgd", *flags)
    assert "--override: --lr 0.1 -> 0.2" in capsys.readouterr().err.replace("\n", " ")
    rows, state = metrics(out), state_of(out, 10)
    assert len(rows) == 10 and rows[4]["lr"] / rows[3]["lr"] > 1.5 and rows[4]["tau"] < 0.9
    groups = state["optimizer"]["param_groups"]
    assert [g["momentum"] for g in groups] == [0.5, 0.5] and groups[0]["weight_decay"] == 0.01
    saved = json.loads((out / "config.json").read_text())["config"]
    before = json.loads((out / "config-until-4.json").read_text())["config"]
    assert saved["optim"]["lr"] == 0.2 and before["optim"]["lr"] == 0.1
    # the new settings are now the run's own
    refused(recipe, out, "--resume", "--optimizer", "sgd", "--lr", "0.1")
    assert train(recipe, out, "--resume", "--optimizer", "sgd", *flags)["complete"]


def test_R16_override_trains_a_finished_run_on(whole, recipe, capsys):
    old = json.loads((whole / "result.json").read_text())
    (whole / "linear").mkdir()
    (whole / "b").mkdir()  # a run that somebody has put here
    for name in ("result.json", "classifier.pt", "config.json"):
        (whole / "linear" / name).write_text('{"config": {"flags": {"ckpt": "run"}}}')
        (whole / "b" / name).write_text('{"config": {"flags": {}}}')
    rows = (whole / "metrics.jsonl").read_bytes()
    result = train(recipe, whole, "--resume", "--override", "--steps", "14", method=Dropped)
    assert result["steps"] == 14 and len(metrics(whole)) == 14
    assert json.loads((whole / "result-until-10.json").read_text()) == old
    assert (whole / "linear-until-10/result.json").exists() and not (whole / "linear").exists()
    assert (whole / "metrics-until-10.jsonl").read_bytes() == rows
    assert classifier_file(whole).parent.name == "b"
    capsys.readouterr()
    refused(recipe, whole, "--resume", "--override", "--steps", "12")
    assert "14 steps are done of 12" in capsys.readouterr().err
    assert json.loads((whole / "result.json").read_text())["steps"] == 14


def test_R16_override_without_a_step_to_train_is_refused(whole, recipe, capsys):
    """The result would be told to be that of settings it has never seen."""
    before = (whole / "config.json").read_bytes()
    refused(recipe, whole, "--resume", "--override", "--lr", "0.005")
    assert "--lr 0.001 -> 0.005 would train nothing" in capsys.readouterr().err
    assert (whole / "config.json").read_bytes() == before


def test_R16_going_back_sets_later_checkpoints_aside(sample, recipe, tmp_path):
    out, flags = tmp_path / "run", ["--lr", "0.002", "--save-every", "2", "--keep", "9"]
    train(recipe, out, "--stop-after", "8", "--save-every", "4", "--keep", "3")
    old = str(out / "checkpoints" / "step-00000004.pt")
    train(recipe, out, "--resume", old, "--override", "--stop-after", "6", *flags)
    assert [p.stem for p in Checkpoints(out / "checkpoints", 0).list()] == [
        "step-00000004", "step-00000006"]  # fmt: skip
    first = out / "checkpoints" / "aside-step-00000008.pt"
    kept = first.read_bytes()
    assert rejected(first) == ""
    assert len((out / "metrics-until-4.jsonl").read_text().splitlines()) == 8
    train(recipe, out, "--resume", "--stop-after", "8", *flags)
    train(recipe, out, "--resume", old.replace("4.pt", "6.pt"), *flags)
    assert first.read_bytes() == kept  # the second one has a name of its own
    assert rejected(first.with_stem("aside-step-00000008+")) == ""
    assert [row["step"] for row in metrics(out)] == list(range(10))


def test_S13_a_new_run_leaves_runs_and_checkpoints_in_its_folder(sample, recipe, tmp_path, capsys):
    out = tmp_path / "runs"
    train(recipe, out / "a", "--steps", "1")
    train(recipe, out, "--steps", "1")
    assert (out / "a" / "result.json").exists() and not list(out.glob("*-until-*"))
    (out / "config.json").unlink()
    refused(recipe, out, "--steps", "2")
    assert "holds a run" in capsys.readouterr().err
    train(recipe, out, "--steps", "2", "--overwrite")
    assert list(tmp_path.glob("runs-*/checkpoints/step-00000001.pt"))


def test_what_is_logged_does_not_depend_on_where_a_run_was_stopped(sample, recipe, tmp_path):
    out = tmp_path / "run"
    train(recipe, out, "--log-every", "4", "--stop-after", "3")
    train(recipe, out, "--log-every", "4", "--resume")
    assert [row["step"] for row in metrics(out)] == [0, 4, 8, 9]


def test_R16_before_the_first_checkpoint(sample, recipe, tmp_path, capsys):
    """config.json never tells of other settings than those that were trained with."""
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "1")
    for path in (out / "checkpoints").iterdir():
        path.unlink()
    capsys.readouterr()
    refused(recipe, out, "--resume", "--lr", "0.002")
    assert "--lr 0.001 -> 0.002" in capsys.readouterr().err
    train(recipe, out, "--resume", "--override", "--lr", "0.002", "--stop-after", "1")
    assert json.loads((out / "config.json").read_text())["config"]["optim"]["lr"] == 0.002


def test_R16_a_refused_resume_leaves_a_folder_that_can_be_used(sample, recipe, tmp_path, capsys):
    out = tmp_path / "new"
    train(recipe, tmp_path / "old", "--stop-after", "4")
    file = str(tmp_path / "old" / "checkpoints" / "step-00000004.pt")
    capsys.readouterr()
    refused(recipe, out, "--resume", file, "--lr", "0.005")
    assert "--lr 0.001 -> 0.005" in capsys.readouterr().err
    assert not (out / "config.json").exists()
    train(recipe, out, "--stop-after", "1")


def test_R16_R19_another_optimizer_or_precision_starts_its_state_anew(sample, recipe, tmp_path):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "2", "--steps", "4")
    flags = ["--optimizer", "sgd", "--lr", "0.1", "--precision", "fp16", "--crop-size", "8"]
    train(recipe, out, "--resume", "--override", "--steps", "4", *flags)
    state = state_of(out, 4)
    assert state["scaler"]["scale"] >= 2**14 and state["facts"]["precision"] == "fp16"
    assert {k for s in state["optimizer"]["state"].values() for k in s} == {"momentum_buffer"}


def spoilt(change):
    """A change of a checkpoint's content, whose checksum is right again."""

    def apply(path):
        state = torch.load(path, weights_only=True)
        change(state)
        save_file(path, state, checksum=True)

    return apply


SPOILT = {
    "C9_empty": (lambda path: path.write_bytes(b""), "no valid checkpoint"),
    "C9_page": (lambda path: path.write_bytes(b"<html>404</html>"), "no valid checkpoint"),
    "C11_missing": (spoilt(lambda s: s["model"].pop("encoder.bn1.bias")),
                    'Missing key(s) in state_dict: "encoder.bn1.bias"'),
    "C11_extra": (spoilt(lambda s: s["model"].update(more=torch.ones(1))),
                  'Unexpected key(s) in state_dict: "more"'),
    "C11_shape": (spoilt(lambda s: s["model"].update({"encoder.bn1.bias": torch.ones(3)})),
                  "size mismatch for encoder.bn1.bias"),
    "C13_nan": (spoilt(lambda s: s["model"]["target_encoder.bn1.bias"].fill_(float("nan"))),
                "target_encoder.bn1.bias is not finite"),
    "C14_schema": (spoilt(lambda s: s.update(schema=2)), "not a checkpoint of byol in format 1"),
    "C14_kind": (spoilt(lambda s: s.update(kind="baseline")), "not a checkpoint of byol"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["auto", "path"])
@pytest.mark.parametrize("spoil, words", SPOILT.values(), ids=SPOILT)
def test_C9_C11_C13_C14_a_checkpoint_that_does_not_fit_is_one_line(
    sample, recipe, tmp_path, capsys, spoil, words, how
):
    out = tmp_path / "run"
    train(recipe, out, "--stop-after", "3")
    path = out / "checkpoints" / "step-00000003.pt"
    spoil(path)
    before = {p: v for p, v in tree(out).items() if "lock" not in p}
    capsys.readouterr()
    refused(recipe, out, "--resume", *([str(path)] if how == "path" else []))
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ") and "Traceback" not in told[0]
    assert words in told[-1], told
    assert {p: v for p, v in tree(out).items() if "lock" not in p} == before


def test_C9_a_folder_in_place_of_a_checkpoint(sample, recipe, tmp_path, capsys):
    refused(recipe, tmp_path / "run", "--resume", str(tmp_path))
    assert str(tmp_path) in capsys.readouterr().err
