"""Each benchmark runs, on sizes that measure nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = {"throughput": ["training", "start"], "peers": ["training"]}


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
        assert entry and all(value > 0 for value in entry.values())
