"""Each benchmark runs, on sizes that measure nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
ROWS = {"throughput": ["training", "profile", "evaluation", "start", "memory", "processes"],
        "peers": ["training", "views", "memory"]}  # fmt: skip


LIGHTLY = "lightly is not installed: benchmarks/requirements.txt"


@pytest.mark.slow
@pytest.mark.parametrize("name, row", [(n, r) for n, rows in ROWS.items() for r in rows])
def test_a_row(tmp_path, name, row):
    if name == "peers" and importlib.util.find_spec("lightly") is None:
        pytest.skip(LIGHTLY)
    path = tmp_path / "found.json"
    flags = ["--tiny", "--rounds", "1", "--rows", row, "--json", str(path)]
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=ROOT, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    found = json.loads(path.read_text())
    assert found.pop("machine") and found
    for entry in found.values():
        figures = [v for k, v in entry.items() if k not in ("what", "difference")]
        assert figures and all(v > 0 for v in figures)


@pytest.mark.slow
def test_the_race(tmp_path):
    if importlib.util.find_spec("lightly") is None:
        pytest.skip(LIGHTLY)
    rng = np.random.default_rng(0)
    for part, count in (("train", 100), ("test", 10)):
        for name in ("a", "b"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i, array in enumerate(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)):
                Image.fromarray(array).save(folder / f"{i}.png")
    path = tmp_path / "found.json"
    flags = ["--data-root", tmp_path / "data", "--out", tmp_path / "race", "--json", path]
    flags += ["--minutes", "0.02", "--seeds", "1"]
    command = [sys.executable, "-m", "benchmarks.race", *map(str, flags)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    found = json.loads(path.read_text())["runs"]
    assert [run["arm"] for run in found] == ["lightly", "lightly, our recipe", "ours"]
    assert all(run["images"] > 0 and 0 <= run["linear"] <= 100 for run in found)
