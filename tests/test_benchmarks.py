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
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MINUTES": "0"}


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["throughput", "peers"])
def test_it_measures(name):
    if name == "peers" and importlib.util.find_spec("lightly") is None:
        pytest.skip("lightly is not installed: benchmarks/requirements.txt")
    flags = "--rounds 1"
    if name == "peers":  # the usual settings take minutes
        flags += " --crop-size 16 --batch-size 4 --stem small"
    printed = subprocess.check_output(
        [sys.executable, "-m", f"benchmarks.{name}", *flags.split()], cwd=ROOT, text=True,
        env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    assert len(rows(printed)) >= 5
    for row in rows(printed):
        numbers = [value for key, value in row.items() if key not in ("setting", "row")]
        assert numbers and all(value > 0 for value in numbers)


def images(root: Path) -> Path:
    """A folder of two classes in CIFAR-10's size."""
    for split, count in (("train", 12), ("test", 5)):
        for label, name in enumerate(("ant", "bee")):
            for n in range(count):
                save(root / split / name / f"{n}.png", picture(32, 32, seed=5 * label + n))
    return root


def runbook(*arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", *map(str, arguments)], cwd=ROOT,
        env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_the_runbook_goes_on_after_a_kill(tmp_path):
    out, data = tmp_path / "out", images(tmp_path / "images")
    process = runbook(out, data)
    while not [*out.glob("cifar10/checkpoints/*.pt")] and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = rows((out / "pieces.jsonl").read_text())
    assert [r["piece"] for r in before] == ["tests", "speed1", "compiled1", "cifar10-speed"]

    assert runbook(out, data).wait(300) == 0
    done = rows((out / "pieces.jsonl").read_text())
    assert done[: len(before)] == before
    assert [row["piece"] for row in done[len(before) :]] == [
        "cifar10",
        "cifar10-linear",
        "cifar10-knn",
    ]
    assert "going on from step" in (out / "cifar10.log").read_text()
    content = json.loads((out / "gpu.json").read_text())
    assert "cifar10" in content["results"]
    assert content["failed"] == [] and content["pieces"].keys() == {r["piece"] for r in done}
    page = (out / "gpu.md").read_text()
    assert "bare step" in page and "| cifar10 |" in page and "## cifar10-knn: exit code 0" in page


@pytest.mark.slow
def test_the_runbook_tells_what_failed(tmp_path):
    """The other pieces still run, and the exit code says so."""
    for name in ("speed1", "compiled1", "cifar10-speed"):
        with open(tmp_path / "pieces.jsonl", "a") as file:
            print(json.dumps({"piece": name, "code": 0, "seconds": 1, "command": ""}), file=file)
        (tmp_path / f"{name}.log").write_text('{"row": "training", "images/s": 9}')
    assert runbook(tmp_path, tmp_path / "nothing").wait(120) == 1
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["failed"] == ["cifar10"] and content["pieces"]["tests"]["code"] == 0
    assert "error: " in (tmp_path / "gpu.md").read_text()
