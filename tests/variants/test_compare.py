"""All methods under one budget."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reproduce
from core.errors import UserError
from eval.table import CONTROLS, Cells


def test_methods_share_budget_and_controls(sample, recipe, tmp_path):
    flags = ["--recipe", recipe, "--out", str(tmp_path / "m"), "--quiet", "--steps", "4"]
    flags += ["--reproduce.seeds", "2", "--linear.strength", "0.1"]
    rows = reproduce.main([*flags, "--methods", "byol", "simsiam"])["rows"]
    assert rows == json.loads((tmp_path / "m/methods.json").read_text())
    for name in ("byol", "simsiam"):
        for seed in (0, 1):
            folder = tmp_path / "m" / f"{name}-random-seed{seed}"
            assert json.loads((folder / "result.json").read_text())["steps"] == 4
            config = json.loads((folder / "config.json").read_text())["config"]
            assert config["run"]["seed"] == seed and config["optim"]["batch_size"] == 64
    cells = Cells(tmp_path / "m/cells.jsonl", False)
    assert len(rows) == 2 * 2 * 2 + 2 * 2
    for row in rows:
        own = row["name"] if row["name"] in CONTROLS else f"{row['name']}-{row['kind']}"
        init = "none" if row["name"] in CONTROLS else "random"
        values = cells.matrix(own, init, row["labels"])[0]
        assert values.shape == (row["seeds"], 2)
        assert row["top1"] == pytest.approx(values.mean())
        if row["seeds"] > 1:
            assert row["std"] == pytest.approx(np.std(values.mean(1), ddof=1))
    text = (tmp_path / "m/methods.md").read_text().splitlines()
    assert len(text) == 2 + 4 and len({line.count("|") for line in text}) == 1
    for picture in ("methods.png", "curves.png"):
        assert (tmp_path / "m" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_mistake_in_any_methods_table_shows_before_the_first(recipe, tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(open(recipe).read().replace("[dino]", "[dino]\nwidth = 3"))
    with pytest.raises(SystemExit) as stop:
        words = ["--methods", "byol", "dino", "--recipe", str(path), "--out", str(tmp_path / "m")]
        reproduce.main(words)
    assert stop.value.code == 2 and "[dino] has no key width" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_several_methods_fetch_no_weights(recipe, monkeypatch):
    """They all start at random, whatever `inits` the recipe has for BYOL."""
    fetched = []
    monkeypatch.setattr(reproduce, "fetch", lambda encoder: fetched.append(encoder.init))
    flags = ["--recipe", recipe, "--reproduce.inits", "random", "imagenet", "--methods", "byol"]
    reproduce.prepare(reproduce.configure(flags))
    assert fetched == ["random", "imagenet"]
    reproduce.prepare(reproduce.configure([*flags, "simsiam"]))
    assert fetched == ["random", "imagenet", "random"]


def test_a_method_without_a_file_is_one_line(recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["--methods", "byol", "rotnet", "--recipe", recipe])
    assert stop.value.code == 2 and "no file variants/rotnet.py" in capsys.readouterr().err


def test_the_command_of_old_says_what_to_type():
    words = [sys.executable, "-m", "variants.compare", "--recipe", "a b.toml", "--steps", "9"]
    root = Path(reproduce.__file__).parent
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    assert done.returncode and "reproduce.py --methods byol simsiam" in done.stderr
    assert "--recipe 'a b.toml' --steps 9" in done.stderr


ABLATIONS = """
from byol.byol import BYOL

class OneDirection(BYOL):
    name = "one_direction"

class NoBatchNorm(BYOL):
    pass
"""


def test_a_file_of_several_methods_needs_a_name(tmp_path, monkeypatch):
    path = Path(reproduce.__file__).parent / "variants" / "ablations_of_a_test.py"
    try:
        path.write_text(ABLATIONS)
        importlib.invalidate_caches()
        found = reproduce.method_of("ablations_of_a_test:OneDirection")
        assert found.__name__ == "OneDirection"
        with pytest.raises(UserError, match="ablations_of_a_test:NoBatchNorm; name one"):
            reproduce.method_of("ablations_of_a_test")
    finally:
        path.unlink()
    for name in ("compare", "../finetune", "byol:BYOL"):
        with pytest.raises(UserError, match="--methods"):
            reproduce.method_of(name)


def test_methods_of_one_name_and_runs_cut_short_are_refused(recipe, tmp_path, capsys):
    for words, text in ((["--methods", "byol", "byol"], "same `name`"), ([], "stop_after = 3")):
        if not words:
            path = tmp_path / "short.toml"
            path.write_text(open(recipe).read().replace("[run]", "[run]\nstop_after = 3"))
            recipe = str(path)
        with pytest.raises(SystemExit) as stop:
            reproduce.main([*words, "--recipe", recipe, "--out", str(tmp_path / "t")])
        assert stop.value.code == 2 and text in capsys.readouterr().err
