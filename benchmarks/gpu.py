"""What is to be measured on the day a GPU is there: `python -m benchmarks.gpu OUT DATA`.

DATA holds cifar-10-batches-py, or CIFAR-10 as train/CLASS/* and test/CLASS/*, and stl10_binary
where STL-10 is wanted too.  OUT gets gpu.json, gpu.md, run folders and a log of each piece.
A piece is a command of at most 9 minutes; MINUTES=30 in the environment are for all.  After a kill
the same call goes on: what is done is skipped, training resumes.  Exit code 1: a piece failed, see
gpu.md.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import train_byol
from core.device import pick_device
from core.files import read_json, read_json_lines, write_json
from reproduce import processor
from training.run_folder import git_commit

ROOT, LIMIT = Path(__file__).parents[1], 540  # seconds for a piece
MINUTES = float(os.environ.get("MINUTES", 30))  # for all calls
TINY = "--width 0.125 --byol.hidden 16 --batch-size 8 --threads 1 --save-every 5 --knn-every 0"
SPEED = (
    "--crop-size 96 --batch-size 256",
    "--crop-size 96 --batch-size 1024",
    "--crop-size 96 --batch-size 1024 --data-on-device never",
    "--crop-size 32 --batch-size 256 --stem cifar",
    "--crop-size 32 --batch-size 1024 --stem cifar",
)


def piece(out: Path, name: str, *command: str) -> bool:
    """Run `python COMMAND` unless it is done; whether it is.  OUT/pieces.jsonl gets its outcome."""
    tries = out / "pieces.jsonl"
    if any(row["piece"] == name and row["code"] == 0 for row in read_json_lines(tries)):
        return True
    row, begun = {"piece": name, "command": " ".join(command)}, time.monotonic()
    print(f"{name}: {row['command']}", flush=True)
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log, cwd=ROOT)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LIMIT)
    finally:
        process.terminate()  # a training saves, and exits with 75
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        row |= {"code": process.wait(), "seconds": round(time.monotonic() - begun)}
        with open(tries, "a") as file:
            file.write(json.dumps(row) + "\n")
    return row["code"] == 0


def steps(out: Path, name: str, flags: list[str]) -> int:
    """Steps that fit in 15 minutes, or in those left less 2; the same after a kill."""
    if (config := out / name / "config.json").exists():
        return read_json(config)["config"]["optim"]["steps"]
    measured = read_json_lines(out / f"{name}-speed.log")
    rate = next(row["images/s"] for row in measured if row["row"] == "training")
    spent = sum(row["seconds"] for row in read_json_lines(out / "pieces.jsonl"))
    seconds = min(15 * 60, (MINUTES - 2) * 60 - spent)
    return max(60, int(rate * seconds / train_byol.configure(flags).optim.batch_size))


def train(out: Path, data: Path, name: str, *flags: str) -> None:
    """A training as long as its rate allows, in parts; linear evaluation and k-NN."""
    if not piece(out, f"{name}-speed", "-m", "benchmarks.throughput", *flags):
        return
    flags += "--steps", str(steps(out, name, flags)), "--data-root", str(data)
    run = "train_byol.py", "--resume", "--out", str(out / name), *flags
    if any(piece(out, name, *run) for _ in range(3)):
        for head in ("linear", "knn"):
            command = "linear_eval.py", "--ckpt", str(out / name), "--data-root", str(data)
            piece(out, f"{name}-{head}", *command, "--head", head, "--overwrite")


def page(out: Path) -> int:
    """Write gpu.json and gpu.md; returns the exit code of it all."""
    pieces = {row["piece"]: row for row in read_json_lines(out / "pieces.jsonl")}
    about = {"machine": processor(torch.device(pick_device("auto"))), "commit": git_commit()}
    about |= {"torch": torch.__version__, "CUDA": torch.version.cuda}
    about["failed"] = [name for name, row in pieces.items() if row["code"]]  # in its last try
    paths = sorted(out.rglob("result.json"))
    results = {path.parent.relative_to(out).as_posix(): read_json(path) for path in paths}
    text = "".join(f"- {name}: {value}\n" for name, value in about.items())
    text += "\n| run | top-1, % | steps | seconds |\n|---|---|---|---|\n"
    for name, row in results.items():
        top1 = row.get("top1", row.get("knn_top1", ""))
        text += f"| {name} | {top1} | {row.get('steps', '')} | {row['seconds']} |\n"
    for name, row in pieces.items():
        log = out / f"{name}.log"
        row["rows"], lines = read_json_lines(log), log.read_text(errors="replace").splitlines()
        text += f"\n## {name}: exit code {row['code']} after {row['seconds']} s\n\n"
        text += "\n".join([f"`{row['command']}`\n", "```", *lines[-25:], "```\n"])
    (out / "gpu.md").write_text(text)
    write_json(out / "gpu.json", about | {"pieces": pieces, "results": results})
    return 1 if about["failed"] else 0


def main() -> int:
    """Run all pieces; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal without a GPU")
    options = parser.parse_args()
    out, data = options.out.resolve(), options.data.resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # ends the piece too
    settings, more = SPEED, ["--save-every", "500", "--knn-every", "2500"]
    if options.tiny:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
        settings, more = SPEED[-1:], TINY.split()
    if importlib.util.find_spec("pytest"):
        piece(out, "tests", "-m", "pytest", "-m", "gpu", "tests/test_gpu.py")
    for number, flags in enumerate(settings, 1):
        command = ["-m", "benchmarks.throughput", *flags.split(), *more]
        piece(out, f"speed{number}", *command)
        piece(out, f"compiled{number}", *command, "--compile")
    folder = ["--dataset", "folder"] if (data / "train").is_dir() else []
    train(out, data, "cifar10", "--recipe", "recipes/cifar10_gpu.toml", *folder, *more)
    if (data / "stl10_binary").is_dir():
        train(out, data, "stl10", "--recipe", "recipes/stl10.toml", *more)
    return page(out)


if __name__ == "__main__":
    sys.exit(main())
