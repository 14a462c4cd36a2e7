"""Each benchmark runs, on sizes that measure nothing."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from folders import picture, save

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["throughput", "peers"])
def test_it_measures(name):
    if name == "peers" and importlib.util.find_spec("lightly") is None:
        pytest.skip("lightly is not installed: benchmarks/requirements.txt")
    flags = ["--rounds", "1", "--images", "1", "--crop-size", "16", "--batch-size", "4"]
    printed = subprocess.check_output(
        [sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=ROOT, text=True,
        env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    measured = rows(printed)
    assert len(measured) >= 5
    for row in measured:
        numbers = [value for key, value in row.items() if key not in ("setting", "row")]
        assert numbers and all(value > 0 for value in numbers)


def images(root: Path) -> Path:
    """A folder of two classes in CIFAR-10's size."""
    for split, count in (("train", 12), ("test", 5)):
        for label, name in enumerate(("ant", "bee")):
            for n in range(count):
                image = picture(32, 32, seed=5 * label + n)
                save(root / split / name / f"{n}.png", image)
    return root


def runbook(*arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        ["benchmarks/gpu.sh", "--tiny", *map(str, arguments)], cwd=ROOT,
        env=ENVIRONMENT | environment, start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_the_runbook_goes_on_after_a_kill(tmp_path):
    out, data = tmp_path / "out", images(tmp_path / "images")
    assert runbook(out, data, LIMIT="1").wait(60) == 75  # no time for a single piece
    saved = out / "cifar10" / "checkpoints"
    process = runbook(out, data)
    while not [*saved.glob("*.pt")] and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = rows((out / "pieces.jsonl").read_text())
    assert {"tests", "speed1", "compiled1", "cifar10-trial"} <= {r["piece"] for r in before}
    number = (out / "cifar10.steps").read_text()

    assert runbook(out, data).wait(300) == 0
    content = json.loads((out / "gpu.json").read_text())
    assert content["pieces"][: len(before)] == before and content["failed"] == ""
    done = [row["piece"] for row in content["pieces"] if row["code"] == 0]
    assert len(done) == len(set(done))  # nothing was done twice
    assert "going on from step" in (out / "cifar10.log").read_text()
    assert (out / "cifar10.steps").read_text() == number
    trained = {row["run"]: row for row in content["runs"]}
    assert trained["cifar10"]["steps"] == int(number)
    assert {"cifar10-linear", "cifar10-knn"} <= trained.keys()
    page = (out / "gpu.md").read_text()
    assert "bare step" in page and "aten::" in page and "top1" in page


@pytest.mark.slow
def test_the_runbook_tells_what_failed(tmp_path):
    """The other pieces still run, and the exit code says so."""
    out, data = tmp_path / "out", tmp_path / "nothing"
    data.mkdir()
    assert runbook(out, data, "cifar10", "tests").wait(120) == 1
    content = json.loads((out / "gpu.json").read_text())
    codes = {row["piece"]: row["code"] for row in content["pieces"]}
    assert codes == {"tests": 0, "cifar10-trial": 2} and content["failed"] == "cifar10-trial"
    assert "error: " in (out / "gpu.md").read_text()
