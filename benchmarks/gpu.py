"""Everything that is to be measured on a GPU: `python -m benchmarks.gpu OUT DATA`, or `make gpu`.

DATA holds cifar-10-batches-py, or CIFAR-10 as train/CLASS/* and test/CLASS/*; and stl10_binary if
STL-10 is wanted too.  OUT gets gpu.md with all output, gpu.json with the numbers, and run folders.
A piece is a command of at most 9 minutes.  The same call goes on after a kill: finished pieces are
skipped, a training resumes.
"""

import argparse
import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

from core.files import read_json, read_json_lines, write_json

SIZES = ["--crop-size 96", "--crop-size 32 --stem cifar"]
BATCHES = ["--batch-size 256", "--batch-size 1024"]
MODES = ["", "--compile", "--data-on-device never"]
TINY = "--width 0.125 --byol.hidden 16 --batch-size 8 --threads 1 --save-every 5 --knn-every 0"


def run_piece(out: Path, name: str, *command) -> dict | None:
    """Run `python COMMAND` if gpu.json lacks its success; returns its record, None if it failed."""
    record, log, result = out / "gpu.json", out / f"{name}.log", out / name / "result.json"
    pieces = read_json(record) if record.exists() else {}
    if name in pieces and pieces[name]["code"] == 0:
        return pieces[name]
    print(f"{name}:", *command, flush=True)
    argv, begun, code = [sys.executable, *map(str, command)], time.monotonic(), "timeout"
    with open(log, "w") as file, contextlib.suppress(subprocess.TimeoutExpired):
        code = subprocess.run(argv, stdout=file, stderr=file, timeout=540).returncode
    row = {"command": argv[1:], "code": code, "seconds": round(time.monotonic() - begun)}
    row["rows"] = read_json_lines(log)
    if result.exists():
        row["rows"].append(read_json(result))
    write_json(record, pieces | {name: row})
    with open(out / "gpu.md", "a") as page:
        page.write(f"## {name}: exit code {code} after {row['seconds']} s\n\n```\n")
        page.write(f"{' '.join(argv)}\n{log.read_text(errors='replace')}```\n\n")
    return row if code == 0 else None


def train(out: Path, data: Path, name: str, seconds: int, *flags: str) -> None:
    """Train for `seconds`, in two pieces; then a linear classifier and k-NN on the features."""
    run, speed = out / name, run_piece(out, f"{name}-speed", "-m", "benchmarks.throughput", *flags)
    if speed is None:
        return
    steps = int(seconds * speed["rows"][0]["steps/s"])
    command = ["train_byol.py", "--resume", "--out", run, "--data-root", data, *flags]
    command += ["--steps", steps]
    run_piece(out, f"{name}-half", *command, "--stop-after", steps // 2)
    if run_piece(out, name, *command):
        for head in ("linear", "knn"):
            command = ["linear_eval.py", "--ckpt", run, "--head", head, "--overwrite"]
            run_piece(out, f"{name}-{head}", *command, "--out", f"{run}-{head}")


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
    speed, seconds = itertools.product(SIZES, BATCHES, MODES), 15 * 60
    more = ["--save-every", "500", "--knn-every", "2500"]
    if args.tiny:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        speed, seconds, more = [(SIZES[1], "--compile")], 2, TINY.split()
    if importlib.util.find_spec("pytest"):
        run_piece(out, "tests", "-m", "pytest", "-m", "gpu", "tests/test_gpu.py")
    for number, flags in enumerate(speed, 1):
        command = ["-m", "benchmarks.throughput", *" ".join(flags).split(), *more]
        run_piece(out, f"speed{number}", *command)
    folder = ["--dataset", "folder"] if (data / "train").is_dir() else []
    train(out, data, "cifar10", seconds, "--recipe", "recipes/cifar10_gpu.toml", *folder, *more)
    if (data / "stl10_binary").is_dir():
        train(out, data, "stl10", seconds, "--recipe", "recipes/stl10.toml", *more)
    pieces = read_json(out / "gpu.json").values()
    sys.exit(any(piece["code"] != 0 for piece in pieces))


if __name__ == "__main__":
    main()
