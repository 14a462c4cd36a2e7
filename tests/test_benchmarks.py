"""Each benchmark runs, on sizes that measure nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["throughput", "peers"])
def test_it_measures(tmp_path, name):
    if name == "peers" and importlib.util.find_spec("lightly") is None:
        pytest.skip("lightly is not installed: benchmarks/requirements.txt")
    path = tmp_path / "results.json"
    flags = ["--tiny", "--rounds", "1", "--json", str(path)]
    subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=ROOT, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120,
    )  # fmt: skip
    results = json.loads(path.read_text())
    assert results.pop("machine") and results
    for entry in results.values():
        assert entry and all(value > 0 for value in entry.values())
