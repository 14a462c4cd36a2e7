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

from benchmarks import gpu

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("lightly", [(), ("--lightly",)])
def test_it_measures(lightly):
    if lightly and importlib.util.find_spec("lightly") is None:
        pytest.skip("lightly is not installed: benchmarks/requirements.txt")
    flags = "--rounds 1 --crop-size 16 --batch-size 4 --stem small"
    printed = subprocess.check_output(
        [sys.executable, "-m", "benchmarks.throughput", *lightly, *flags.split()], cwd=ROOT,
        text=True, env=ENVIRONMENT, timeout=300,
    )  # fmt: skip
    about, *measured = rows(printed)
    assert about.keys() == {"machine", "torch", "commit", "setting"}
    assert len(measured) == (7 if lightly else 4)
    for row in measured:
        assert len(row) >= 2 and all(row[key] > 0 for key in row.keys() - {"row"})


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


def pieces(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text())["pieces"]


@pytest.mark.slow
def test_the_runbook_goes_on_after_a_kill(tmp_path):
    out, data = tmp_path / "out", images(tmp_path / "images")
    process = runbook(out, data)
    while not [*out.glob("cifar10/checkpoints/*.pt")] and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = pieces(out)
    assert [*before] == ["tests", "speed1", "cifar10-speed"]

    assert runbook(out, data).wait(300) == 0
    after = pieces(out)
    assert {name: after[name] for name in before} == before
    trained = ["cifar10-half", "cifar10", "cifar10-linear", "cifar10-knn"]
    assert [*after] == [*before, *trained]
    assert "going on from step" in (out / "cifar10-half.log").read_text()
    assert all(row["code"] == 0 for row in after.values())
    assert after["cifar10"]["rows"][-1]["name"] == "byol"
    assert all(after[name]["rows"][-1]["test_images"] == 10 for name in trained[2:])
    facts, page = json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text()
    for key in ("machine", "torch", "commit"):
        assert f"- {key}: {facts[key]}\n" in page and facts[key]
    top1, seconds = after["cifar10-knn"]["rows"][-1]["top1"], after["cifar10-knn"]["seconds"]
    assert f"| cifar10-knn | 0 | {seconds} |  | {top1} |" in page
    rate = before["speed1"]["rows"][1]["images/s"]
    assert f"| speed1 | 0 | {before['speed1']['seconds']} | {rate} |  |" in page
    assert "bare step" in page and "## cifar10-knn" in page


@pytest.mark.slow
def test_the_runbook_tells_what_failed(tmp_path):
    """The other pieces still run, and the exit code says so."""
    done = {"command": [], "code": 0, "seconds": 1, "rows": [{"row": "training", "steps/s": 9}]}
    earlier = {"speed1": done, "cifar10-speed": done}
    (tmp_path / "gpu.json").write_text(json.dumps({"pieces": earlier}))
    for name in earlier:
        (tmp_path / f"{name}.log").touch()
    assert runbook(tmp_path, tmp_path / "nothing").wait(120) == 1
    codes = {name: row["code"] for name, row in pieces(tmp_path).items()}
    assert codes["tests"] == 0 and codes["cifar10"] > 0
    assert "error: " in (tmp_path / "gpu.md").read_text()


def test_sigterm_to_the_runbook_ends_its_piece(tmp_path):
    process = runbook(tmp_path, tmp_path / "nothing")
    while not (tmp_path / "tests.log").exists():
        time.sleep(0.02)
    time.sleep(0.5)
    process.terminate()
    assert process.wait(30) == 143
    with pytest.raises(ProcessLookupError):  # nothing is left of its group
        os.killpg(process.pid, 0)


@pytest.mark.parametrize("minutes, steps", [(30, 2 * 585), (60, 2 * 900), (0, 60)])
def test_trainings_share_the_time_that_is_left(tmp_path, monkeypatch, minutes, steps):
    """Five pieces of 54 s come before; a training that an earlier call began keeps its steps."""
    commands = {}

    def piece(out, name, *command):
        commands[name] = command
        return {"code": 0, "seconds": 54, "rows": [{"commit": "x"}, {"steps/s": 2.0}]}

    monkeypatch.setattr(gpu, "run_piece", piece)
    (tmp_path / "stl10_binary").mkdir()
    gpu.run_all(tmp_path, tmp_path, ["--compile", ""], minutes, [])
    assert [commands[name][-1] for name in ("cifar10", "stl10")] == [steps, steps]

    (tmp_path / "stl10").mkdir()
    begun = {"config": {"optim": {"steps": 77}}}
    (tmp_path / "stl10" / "config.json").write_text(json.dumps(begun))
    gpu.run_all(tmp_path, tmp_path, ["--compile", ""], minutes, [])
    assert [commands[name][-1] for name in ("cifar10", "stl10")] == [steps, 77]
