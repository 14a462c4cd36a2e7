"""Whatever is typed or stands in a file: a clear error of one line, or a correct run.

Never a traceback, a hang or a changed file.  Cases are drawn by hypothesis, the same ones each
time; a new one that fails belongs in the tests of its module.
"""

import contextlib
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, stl10_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import data.sample
import finetune
import linear_eval
import train_baseline
import train_byol
from core.errors import UserError, reason_of
from data import folder, stl10
from data.datasets import DataConfig
from training.checkpoints import Checkpoints, save_file
from training.resume import newest_valid
from training.run_folder import read_metrics
from training.weights import load_file, read_weights

SCRIPTS = [train_byol, train_baseline, finetune, linear_eval]
quick = settings(max_examples=300, derandomize=True, deadline=None, database=None,
                 suppress_health_check=list(HealthCheck))  # fmt: skip
few = settings(quick, max_examples=40)


def one_line(call):
    """The value of `call`, or None where it refused with one line."""
    try:
        return call()
    except UserError as error:
        text = reason_of(error)
        assert text and "\n" not in text and "\r" not in text, text
        return None


def tree(path) -> dict:
    return {p: p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def run(subset, tmp_path_factory) -> Path:
    """A finished run of 4 steps, with checkpoints of steps 2 and 4."""
    out = tmp_path_factory.mktemp("fuzz") / "run"
    (out.parent / "tiny.toml").write_text(TINY)
    flags = ["--recipe", str(out.parent / "tiny.toml"), "--out", str(out), "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.sample, "load", lambda root, config: subset)
        train_byol.main(argv=[*flags, "--steps", "4", "--save-every", "2"])
    return out


# Command lines and recipes

VALUES = ["0", "1", "-1", "3", "0.5", "1e-3", "1e400", "nan", "-inf", "9" * 20, "1_0", "", " ",
          "auto", "adamw", "sgd", "cpu", "stl", "sample", "folder", "é\n", "--", "-", "0 1",
          "[1]", "true", "None", "../x", "/dev/null", "a" * 300]  # fmt: skip
FLAGS = """--lr --seed --epochs --steps --batch-size --accumulate --optimizer --momentum --gpus
--device --precision --dataset --data-root --crop-size --labels --draw --fold --arch --stem --width
--init --resume --override --no-override --recipe --ckpt --head --protocol --folds --sweep --quiet
--view1.area --view1.blur-p --view2.aspect --byol.base-tau --byol.hidden --no-byol.predictor
--linear.strength --mlp.hidden --finetune.sweep-lr --baseline.flip-p --nothing --LR -h""".split()
letters = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4)
values = st.one_of(st.sampled_from(VALUES), letters, st.floats().map(str))
pairs = st.tuples(st.sampled_from(FLAGS), values).map(list)
words = st.one_of(pairs, pairs, pairs, st.sampled_from(FLAGS).map(lambda flag: [flag]))
arguments = st.lists(words, max_size=4).map(lambda found: sum(found, []))


@quick
@given(arguments, st.sampled_from(SCRIPTS))
def test_A1_any_command_line_is_settings_or_one_line(argv, script):
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # -h
            config = one_line(lambda: script.configure(argv))
    except SystemExit as stop:
        assert stop.code == 0
    else:
        assert config is None or config.run.out


plain = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(max_size=5), st.none(),
                  st.lists(st.floats(0, 1), max_size=3))  # fmt: skip
TABLES = {"data": ["dataset", "crop_size", "labels"], "optim": ["lr", "epochs", "optimizer"],
          "encoder": ["width", "stem"], "view1": ["area", "blur_p", "size"], "run": ["seed"],
          "byol": ["base_tau", "lr", "hidden"], "finetune": ["steps", "sweep_lr"], "simsiam": ["x"],
          "nonsense": ["y"]}  # fmt: skip
lines = st.sampled_from([(t, k) for t in TABLES for k in [*TABLES[t], "unknown", "é"]])


def toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if not isinstance(value, float) else repr(value)


@quick
@given(st.lists(st.tuples(lines, plain), max_size=4), st.text(max_size=3), st.sampled_from(SCRIPTS))
def test_A1_any_recipe_is_settings_or_one_line(tmp_path_factory, content, noise, script):
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    text = "".join(f"[{t}]\n{k} = {toml(v)}\n" for (t, k), v in content)
    path.write_text(text + noise, encoding="utf-8", errors="replace", newline="")
    one_line(lambda: script.configure(["--recipe", str(path)]))


@pytest.mark.faults
@few
@given(st.data())
def test_A1_settings_in_range_train_or_are_refused(subset, tmp_path_factory, draw):
    """Each in its range, but nobody has seen the combination."""
    values = {
        "--optimizer": ["lars", "sgd", "adamw"], "--lr": ["0", "0.01", "1e3"],
        "--momentum": ["0", "0.9999"], "--batch-size": ["2", "6", "64", "320", "321"],
        "--accumulate": ["1", "3", "32"], "--stem": ["cifar", "stl", "imagenet"],
        "--width": ["0.0625", "0.1"], "--crop-size": ["8", "17", "40"], "--steps": ["1", "3"],
        "--precision": ["bf16", "fp16", "fp32"],
        "--warmup-epochs": ["0", "1e9"], "--knn-every": ["0", "1"], "--stop-after": ["0", "1"],
        "--byol.base-tau": ["0", "1"], "--byol.hidden": ["1", "8"], "--byol.projection": ["1", "4"],
        "--view1.area": ["1e-9 1e-9", "1 1", "0 0"], "--view2.aspect": ["1e-3 1e3", "1 1"],
        "--view1.jitter-p": ["0", "1"], "--view1.blur-sigma": ["1e-9 100", "0 0"],
        "--pretrain-on": ["unlabelled"], "--seed": [str(2**63 - 1)], "--eval-size": ["8", "300"],
    }  # fmt: skip
    chosen = draw.draw(st.lists(st.sampled_from(sorted(values)), max_size=6, unique=True))
    flags = [w for k in chosen for w in [k, *draw.draw(st.sampled_from(values[k])).split()]]
    base = tmp_path_factory.mktemp("combination")
    (base / "tiny.toml").write_text(TINY)
    shared = ["--recipe", str(base / "tiny.toml"), "--steps", "2", "--out", str(base / "run")]
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(told):
        patch.setattr(data.sample, "load", lambda root, config: subset)
        try:
            result = train_byol.main(argv=[*shared, *flags, "--quiet"])
        except SystemExit as stop:
            text = told.getvalue()
            assert stop.code in (1, 2) and text.count("\n") == 1 and text.startswith("error: ")
        else:
            assert result.get("stopped") is False or (base / "run" / "encoder.pt").exists()
    torch.set_num_threads(1)


# Files of weights and runs

edits = st.lists(
    st.tuples(st.sampled_from("flip cut insert zero".split()), st.floats(0, 1), st.integers(1, 99)),
    min_size=1, max_size=4,
)  # fmt: skip


def edited(content: bytes, changes) -> bytes:
    content = bytearray(content)
    for how, where, size in changes:
        place = int(where * max(len(content) - 1, 0))
        if how == "flip" and content:
            content[place] ^= 1 << size % 8
        elif how == "cut":
            del content[place:]
        elif how == "insert":
            content[place:place] = bytes(range(size))
        else:
            content[place : place + size] = bytes(min(size, len(content) - place))
    return bytes(content)


@quick
@given(edits)
def test_C5_C6_C7_an_edited_checkpoint_is_never_taken(tmp_path_factory, changes):
    checkpoints = Checkpoints(tmp_path_factory.mktemp("c"), 1)
    for step in (1, 2):
        checkpoints.save(step, {"w": torch.full((20,), float(step)), "note": "x"})
    newest = checkpoints.list()[-1]
    content = newest.read_bytes()
    newest.write_bytes(edited(content, changes))
    before = tree(checkpoints.folder)
    with contextlib.redirect_stderr(io.StringIO()):
        found = newest_valid(checkpoints)
    assert found["step"] == (2 if newest.read_bytes() == content else 1)
    assert torch.equal(found["w"], torch.full((20,), float(found["step"])))
    assert tree(checkpoints.folder) == before


@quick
@given(edits)
def test_C6_C7_edited_weights_are_refused_or_the_same(tmp_path_factory, changes):
    """Without a checksum beside: as long as they load, no number has changed."""
    path = tmp_path_factory.mktemp("w") / "encoder.pt"
    save_file(path, {"state_dict": {"w": torch.arange(200.0)}, "meta": {"arch": "resnet18"}})
    path.write_bytes(edited(path.read_bytes(), changes))
    found = one_line(lambda: load_file(path, "--ckpt"))
    if found is not None:
        assert torch.equal(found["state_dict"]["w"], torch.arange(200.0))


def repacked(path: Path, changes) -> None:
    """The pickle inside is edited, and the archive's checksums are right again."""
    with zipfile.ZipFile(path) as archive:
        parts = {i.filename: archive.read(i) for i in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, edited(content, changes) if "data.pkl" in name else content)


@quick
@given(edits)
def test_C10_an_edited_pickle_runs_nothing_and_is_one_line(tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("p") / "encoder.pt"
    save_file(path, {"state_dict": {"w": torch.ones(3)}, "meta": {"arch": "resnet18"}})
    repacked(path, changes)
    one_line(lambda: read_weights(path))


tensors = st.sampled_from([torch.ones(3), torch.ones(()), torch.ones(2, 2), torch.ones(1).long()])
anything = st.recursive(
    st.one_of(plain, tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["model", "state_dict", "encoder", "meta", "mean", "arch",
                                         "encoder.conv1.weight", "step", "config", "data"]), inner,
                        max_size=4)),
    max_leaves=12,
)  # fmt: skip


@quick
@given(anything)
def test_C9_C11_any_content_of_a_file_of_weights_is_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "x.pt"
    torch.save(content, path)
    argv = ["--ckpt", str(path), "--device", "cpu"]
    one_line(lambda: linear_eval.configure(argv))


@quick
@given(edits, st.sampled_from(["config.json", "metrics.jsonl", "result.json"]))
def test_C17_edited_records_of_a_run_are_one_line(run, tmp_path_factory, changes, name):
    out = tmp_path_factory.mktemp("record")
    for each in ("config.json", "metrics.jsonl", "result.json", "encoder.pt"):
        shutil.copy(run / each, out / each)
    (out / name).write_bytes(edited((out / name).read_bytes(), changes))
    assert isinstance(read_metrics(out / "metrics.jsonl"), list)
    one_line(lambda: finetune.configure(["--ckpt", str(out)]))
    config = train_byol.configure(["--recipe", str(run.parent / "tiny.toml"), "--resume"])
    one_line(lambda: train_byol.finished(out, config))


# Data


@quick
@given(edits, st.data())
def test_D1_D2_edited_files_of_stl10_are_one_line(tmp_path_factory, changes, draw):
    root = tmp_path_factory.mktemp("stl10")
    home = stl10_files(root)
    name = draw.draw(st.sampled_from(sorted(p.name for p in home.iterdir())))
    (home / name).write_bytes(edited((home / name).read_bytes(), changes))
    before = tree(home)
    found = one_line(lambda: stl10.load(root, DataConfig()))
    if found is not None:
        assert len(found.train) == len(found.train_labels) and len(found.folds) == 10
        found.train.take(np.arange(len(found.train)))
    assert tree(home) == before


@few
@given(edits, st.sampled_from(["PNG", "JPEG", "GIF", "BMP"]))
def test_D7_edited_images_are_packed_or_left_out(tmp_path_factory, changes, kind):
    root = tmp_path_factory.mktemp("folder")
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (root / place).mkdir(parents=True)
        Image.fromarray(np.full((12, 12, 3), 99, np.uint8)).save(root / place / "good.png")
    bad = root / "train" / "a" / f"bad.{kind.lower()}"
    Image.effect_noise((12, 12), 50).convert("RGB").save(bad, kind)
    bad.write_bytes(edited(bad.read_bytes(), changes))
    before = {p: v for p, v in tree(root).items() if p.suffix in (".png", ".jpeg", ".gif", ".bmp")}
    config = DataConfig(dataset="folder", store_size=8)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        one_line(lambda: folder.prepare(root, config))
        found = one_line(lambda: folder.load(root, config))
    assert found is None or len(found.train) in (2, 3)
    after = {p: v for p, v in tree(root).items() if p in before}
    assert after == before
