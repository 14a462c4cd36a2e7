"""The arithmetic and the page of benchmarks/gpu.sh."""

import os
import statistics
import sys
from pathlib import Path

import torch

from core.files import read_json, read_json_lines, write_json
from training.run_folder import git_commit, read_metrics

SHOWN = ("steps", "seconds", "knn_top1", "top1", "labels", "test_images")


def steps(out: Path, name: str, share: str) -> None:
    """Write the number of steps of a run, which its schedules need from the first step on.

    By the rate of the trial, for 1/share of the time that is left, less 2 minutes for evaluation.
    """
    rates = [row["images_per_second"] for row in read_metrics(out / f"{name}-trial/metrics.jsonl")]
    rate = statistics.median(rates[1:])  # the first step is slower
    batch = read_json(out / f"{name}-trial/config.json")["config"]["optim"]["batch_size"]
    spent = sum(row["seconds"] for row in read_json_lines(out / "pieces.jsonl"))
    left = 60 * float(os.environ.get("MINUTES", 30)) - spent
    seconds = min(900, left / int(share) - 120)
    number = max(60, int(rate * seconds / batch))
    (out / f"{name}.steps").write_text(str(number))
    print(f"{rate:,.0f} images/s; {number:,} steps of {batch} images")


def table(rows: list[dict]) -> str:
    """A Markdown table with a column for each key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([row.get(key, "") for key in keys] for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"


def page(out: Path, command: str) -> int:
    """Write gpu.json and gpu.md; returns the exit code of it all."""
    tries = read_json_lines(out / "pieces.jsonl")
    pieces = {row["piece"]: row for row in tries}  # the last try of each
    failed = [name for name, row in pieces.items() if row["code"] not in (0, 75)]
    logs = {name: out / f"{name}.log" for name in pieces if (out / f"{name}.log").exists()}
    measured = [row for log in logs.values() for row in read_json_lines(log) if "row" in row]
    runs = []
    for path in sorted(out.rglob("result.json")):
        name, result = "-".join(path.parent.relative_to(out).parts), read_json(path)
        card = pieces.get(name, {}).get("card", "")
        runs.append({"run": name, "card": card, **{k: result.get(k, "") for k in SHOWN}})
    about = {"command": command, "commit": git_commit(), "torch": torch.__version__}
    about |= {"CUDA": torch.version.cuda, "failed": ", ".join(failed)}
    write_json(out / "gpu.json", about | {"runs": runs, "measured": measured, "pieces": tries})
    text = f"# Measured on: {tries[-1]['card']}\n\n"
    text += "".join(table(rows) for rows in ([about], runs, measured, tries) if rows)
    for name, log in logs.items():
        last = log.read_text(errors="replace").splitlines()[-25:]
        text += f"## {name}\n\n```\n" + "\n".join(last) + "\n```\n\n"
    (out / "gpu.md").write_text(text)
    return 1 if failed else 75 if any(row["code"] for row in pieces.values()) else 0


if __name__ == "__main__":
    sys.exit({"steps": steps, "page": page}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:]))
