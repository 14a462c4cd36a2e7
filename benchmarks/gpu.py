"""Everything that is to be measured on a GPU: `python -m benchmarks.gpu OUT DATA`, or `make gpu`.

DATA holds cifar-10-batches-py, or CIFAR-10 as train/CLASS/* and test/CLASS/*; and stl10_binary if
STL-10 is wanted too.  OUT gets gpu.md, gpu.json, a log of each piece, and run folders.
A piece is a command of at most 9 minutes.  MINUTES=30 in the environment are for all pieces: the
trainings share what tests and speed leave of it.  The same call goes on after a kill: finished
pieces are skipped, a training resumes.
"""

import argparse
import contextlib
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import ChainMap
from pathlib import Path

from core.files import read_json, read_json_lines, write_json

LIMIT = 9 * 60  # seconds for a piece
SIZES = ["--crop-size 96", "--crop-size 32 --stem cifar"]
BATCHES = ["--batch-size 256", "--batch-size 1024"]
MODES = ["", "--compile", "--data-on-device never"]
TINY = "--width 0.125 --byol.hidden 16 --batch-size 8 --threads 1 --save-every 5 --knn-every 0"


def run_piece(out: Path, name: str, *command) -> dict:
    """Run `python COMMAND` unless an earlier call did with success; returns its part of gpu.json.

    That is command, exit code, seconds, and rows: the lines of JSON in the output, and result.json.
    """
    file, log, result = out / "gpu.json", out / f"{name}.log", out / name / "result.json"
    pieces = read_json(file)["pieces"] if file.exists() else {}
    if name in pieces and pieces[name]["code"] == 0:
        return pieces[name]
    print(f"{name}:", *command, flush=True)
    argv, begun = [*map(str, command)], time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen([sys.executable, *argv], stdout=output, stderr=output)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LIMIT)
    finally:
        code = end(process)
    pieces[name] = {"command": argv, "code": code, "seconds": round(time.monotonic() - begun)}
    pieces[name]["rows"] = read_json_lines(log)
    if result.exists():
        pieces[name]["rows"].append(read_json(result))
    write_results(out, pieces)
    return pieces[name]


def end(process: subprocess.Popen) -> int:
    """The exit code of a process; if it still runs, SIGTERM ends it, at which a training saves."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    process.kill()
    return process.wait()


def write_results(out: Path, pieces: dict) -> None:
    """Write gpu.json; and gpu.md, with a table of the pieces and the output of each."""
    values = ChainMap(*[row for piece in pieces.values() for row in piece["rows"]])
    about = {key: values.get(key) for key in ("machine", "torch", "commit")}
    write_json(out / "gpu.json", about | {"pieces": pieces})
    lines = [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "| piece | exit code | seconds | images/s | top-1, % |", "|---|---|---|---|---|"]
    for name, piece in pieces.items():
        values = ChainMap(*piece["rows"])  # of several rows with a key the first counts
        cells = [name, piece["code"], piece["seconds"]]
        cells += [values.get("images/s", ""), values.get("top1", values.get("knn_top1", ""))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for name, piece in pieces.items():
        log = (out / f"{name}.log").read_text(errors="replace")
        lines += ["", f"## {name}", "", "```", f"python {' '.join(piece['command'])}", log, "```"]
    (out / "gpu.md").write_text("\n".join(lines) + "\n")


def train(out: Path, name: str, steps: int, *flags) -> None:
    """Train in two pieces, then evaluate with a linear classifier and k-NN."""
    run = out / name
    if (run / "config.json").exists():  # an earlier call began it; --resume wants the same steps
        steps = read_json(run / "config.json")["config"]["optim"]["steps"]
    command = ["train_byol.py", "--resume", "--out", run, *flags, "--steps", steps]
    run_piece(out, f"{name}-half", *command, "--stop-after", steps // 2)
    if run_piece(out, name, *command)["code"] == 0:
        for head in ("linear", "knn"):
            command = ["linear_eval.py", "--ckpt", run, "--head", head, "--overwrite"]
            run_piece(out, f"{name}-{head}", *command, "--out", f"{run}-{head}")


def run_all(out: Path, data: Path, settings: list[str], minutes: float, more: list[str]) -> None:
    """Run the tests, measure the speed in each of `settings`, train in what is left of `minutes`.

    settings, more   flags of train_byol.py: of one speed piece each; of all pieces
    """
    measure = ["-m", "benchmarks.throughput"]
    folder = ["--dataset", "folder"] if (data / "train").is_dir() else []
    trainings = {"cifar10": ["--recipe", "recipes/cifar10_gpu.toml", *folder, *more]}
    if (data / "stl10_binary").is_dir():
        trainings["stl10"] = ["--recipe", "recipes/stl10.toml", *more]
    tests = ["tests/test_gpu.py", "tests/data/test_loader.py", "tests/test_fake_devices.py"]
    done = []
    if importlib.util.find_spec("pytest"):  # -rP prints the counts of kernels under fake tensors
        done.append(run_piece(out, "tests", "-m", "pytest", "-rP", "-k", "gpu or kernels", *tests))
    for number, flags in enumerate(settings, 1):
        done.append(run_piece(out, f"speed{number}", *measure, *flags.split(), *more))
    rates = {}
    for name, flags in trainings.items():
        rates[name] = run_piece(out, f"{name}-speed", *measure, *flags)
    spent = sum(piece["seconds"] for piece in [*done, *rates.values()])
    seconds = min(15 * 60, (60 * minutes - spent) / len(trainings) - 180)  # 180 to evaluate
    for name, flags in trainings.items():
        if rates[name]["code"] == 0:
            rate = ChainMap(*rates[name]["rows"])["steps/s"]
            train(out, name, max(60, int(seconds * rate)), "--data-root", data, *flags)


def main() -> None:
    """Run all pieces; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal without a GPU")
    args = parser.parse_args()
    out, data = args.out.resolve(), args.data.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(Path(__file__).parents[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the piece too
    if args.tiny:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        run_all(out, data, [f"{SIZES[1]} --compile"], 0, TINY.split())
    else:
        settings = [" ".join(flags) for flags in itertools.product(SIZES, BATCHES, MODES)]
        minutes, more = float(os.environ.get("MINUTES", 30)), "--save-every 500 --knn-every 2500"
        run_all(out, data, settings, minutes, more.split())
    pieces = read_json(out / "gpu.json")["pieces"]
    sys.exit(any(piece["code"] != 0 for piece in pieces.values()))


if __name__ == "__main__":
    main()
