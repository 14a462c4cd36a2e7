"""Sides measured in turn, A B A B, in one process; medians, spread and ratios; one table."""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Apart:
    """A side in a process of its own, as a user runs it; `make(*arguments)` builds it there."""

    def __init__(self, make: Callable, *arguments) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments))
        self.process.start()

    def __call__(self) -> int:
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self) -> None:
        """End its process."""
        self.pipe.send(False)
        self.process.join()


def _serve(pipe, make: Callable, arguments: tuple) -> None:
    side = make(*arguments)
    while pipe.recv():
        pipe.send(side())


def alternate(sides: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Images a second of each side in each round, after one round that is not counted.

    A side is a function that works off some images and returns how many.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, work in sides.items():
            begun = time.perf_counter()
            images = work()
            if number:
                rates[name].append(images / (time.perf_counter() - begun))
    return rates


def row(what: str, rates: dict[str, list[float]], ours: str, theirs: str) -> dict:
    """Median rate of two sides, and the median of the ratios of neighbouring rounds."""
    ratios = sorted(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))
    return {
        "what": what,
        ours: statistics.median(rates[ours]),
        theirs: statistics.median(rates[theirs]),
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }


def memory_of(pid: int, name: str, file: str = "status") -> float:
    """A figure of /proc/PID/status or smaps_rollup in MiB; 0 where the process has ended."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text()
    except OSError:
        return 0.0
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def peak_memory(words: list[str]) -> float:
    """The most memory, MiB, that a command and its children had together; shared pages once."""
    process, peak = subprocess.Popen(words), 0.0
    while process.poll() is None:
        try:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        except OSError:
            children = []
        pids = [process.pid, *map(int, children)]
        peak = max(peak, sum(memory_of(pid, "Pss", "smaps_rollup") for pid in pids))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"failed: {words}")
    return peak


def machine() -> str:
    """Processor, cores and versions in one line."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpu.splitlines() if "model name" in line]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else (names or ["CPU"])[0]
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}"


def arguments(description: str, rows: dict[str, Callable]) -> argparse.Namespace:
    """--rows, --rounds, --tiny and --json of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows), help="which ones")
    parser.add_argument("--rounds", type=int, default=5, help="of each side, in turn [5]")
    parser.add_argument("--tiny", action="store_true", help="a trial of seconds, figures worthless")
    parser.add_argument("--json", help="write one object, with a key for each row")
    return parser.parse_args()


def main(description: str, rows: dict[str, Callable]) -> None:
    """Measure the rows that are asked for, print them as a table, write the JSON."""
    options = arguments(description, rows)
    print(f"{machine()}\n", flush=True)
    found = {}
    for name in options.rows:
        for entry in rows[name](options):
            found[entry["what"]] = entry
            shown = [f"{k} {v:,.3g}" if v < 100 else f"{k} {v:,.0f}" for k, v in entry.items()
                     if isinstance(v, int | float)]  # fmt: skip
            print(f"{entry['what']}: " + ", ".join(shown), flush=True)
        gc.collect()
    if options.json:
        text = json.dumps({"machine": machine(), **found}, indent=2)
        Path(options.json).write_text(text + "\n")
