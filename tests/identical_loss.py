"""The judge of a refactoring: do this tree and an earlier commit compute the same, bit for bit?

    python tests/identical_loss.py COMMIT [CASE ...]

Pretrains with BYOL and each variant, trains the baseline and fine-tunes for 20 steps, in fp32 and
bf16, in one process and in two, and evaluates what BYOL has pretrained; once with this tree and
once with the files of COMMIT.  Every row of metrics.jsonl (losses, rates, tau, online evaluation)
and every result.json must be equal to the last digit.  Exit code 1 where one is not.  A CASE names
those to run: byol-bf16-2, linear-augmented, ...

Times and what a tree says of itself (its commit) are left out.  Ten minutes on two cores.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from recipes import HEADS

ROOT = Path(__file__).parents[1]
RECIPE = (
    """
[data]
dataset = "sample"
crop_size = 24
[encoder]
stem = "small"
width = 0.125
[optim]
batch_size = 64
steps = 20
[run]
threads = 1
device = "cpu"
log_every = 1
save_every = 10
knn_every = 10
quiet = true
"""
    + HEADS
    + """
[baseline]
batch_size = 20
steps = 20
[finetune]
batch_size = 20
steps = 20
[mlp]
hidden = 16
steps = 20
[augmented]
epochs = 2
"""
)
METHODS = ("byol", "simsiam", "simclr", "barlow_twins", "vicreg", "moco_v3", "dino")
TIMES = ("images_per_second", "seconds")


def commands(folder: Path) -> list[dict[str, list[str]]]:
    """Stages of cases, name -> words after `python`; a stage uses the runs of those before it."""
    shared = ["--recipe", str(folder / "recipe.toml")]
    processes = {1: [], 2: ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]}
    training, tuning = {}, {}
    for precision in ("fp32", "bf16"):
        for count, launcher in processes.items():
            end = f"{precision}-{count}"

            def flags(name, end=end, precision=precision):
                out = ["--precision", precision, "--out", str(folder / f"{name}-{end}")]
                return [*shared, *out]

            for name in METHODS:
                script = ["train_byol.py"] if name == "byol" else ["-m", f"variants.{name}"]
                training[f"{name}-{end}"] = [*launcher, *script, *flags(name)]
            training[f"baseline-{end}"] = [
                *launcher, "train_baseline.py", *flags("baseline"), "--labels", "100",
            ]  # fmt: skip
            tuning[f"finetune-{end}"] = [
                *launcher, "finetune.py", *flags("finetune"), "--labels", "100",
                "--ckpt", str(folder / f"byol-{end}"),
            ]  # fmt: skip
    byol, fp32 = str(folder / "byol-fp32-1"), ["--precision", "fp32"]
    evaluate = ["linear_eval.py", *shared, "--ckpt", byol, "--labels", "100"]
    for head in ("linear", "mlp", "knn"):
        tuning[f"linear-{head}"] = [*evaluate, "--head", head, "--out", str(folder / head)]
    tuning["linear-augmented"] = [
        *evaluate, "--protocol", "augmented", "--out", str(folder / "augmented"),
    ]  # fmt: skip
    training["probe"] = [
        "train_byol.py", *shared, *fp32, "--online-probe", "--accumulate", "2",
        "--out", str(folder / "probe"),
    ]  # fmt: skip
    training["eval-size"] = [
        "train_byol.py", *shared, *fp32, "--stem", "cifar", "--eval-size", "26", "--steps", "3",
        "--out", str(folder / "eval-size"),
    ]  # fmt: skip
    training["sweep"] = [
        "train_baseline.py", *shared, *fp32, "--labels", "100", "--sweep", "--out",
        str(folder / "sweep"), "--baseline.sweep-lr", "0.01", "0.1", "--baseline.sweep-epochs", "2",
    ]  # fmt: skip
    resumed = {"resumed": [
        "train_byol.py", *shared, *fp32, "--out", byol, "--resume", "--override", "--steps", "25",
    ]}  # fmt: skip
    return [training, tuning, resumed]


def run(tree: Path, folder: Path, only: list[str]) -> None:
    """All cases with the code of `tree`, two at a time; their runs lie in `folder`."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(case):
        name, words = case
        done = subprocess.run([sys.executable, *words], cwd=tree, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        if done.returncode:
            print(f"{name} in {tree}: exit code {done.returncode}\n{done.stderr[-2000:]}")

    for stage in commands(folder):
        cases = [(k, v) for k, v in stage.items() if not only or k in only]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(start, cases))


def records(folder: Path) -> dict[str, list[dict]]:
    """File below `folder` -> its rows, without times."""
    found = {}
    for path in sorted([*folder.rglob("metrics.jsonl"), *folder.rglob("result*.json")]):
        text = path.read_text()
        rows = map(json.loads, text.splitlines()) if path.suffix == ".jsonl" else [json.loads(text)]
        found[str(path.relative_to(folder))] = [
            {k: v for k, v in row.items() if k not in TIMES} for row in rows
        ]
    return found


def compare(before: dict, after: dict) -> list[str]:
    """What differs between two sets of `records`, one line each."""
    different = []
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is None or new is None or len(old) != len(new):
            counts = [len(rows) if rows else "no" for rows in (old, new)]
            different.append(f"{name}: {counts[0]} rows before, {counts[1]} after")
            continue
        for row, (a, b) in enumerate(zip(old, new, strict=True)):
            keys = [k for k in a | b if a.get(k) != b.get(k)]
            if keys:
                pair = f"{keys[0]} {a.get(keys[0])} before, {b.get(keys[0])} after"
                different.append(f"{name}, row {row}: {pair}")
                break
    return different


def main(commit: str, only: list[str]) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        old = Path(temporary, "code")
        old.mkdir()
        archive = Path(temporary, "code.tar")
        subprocess.run(["git", "archive", "-o", str(archive), commit], cwd=ROOT, check=True)
        with tarfile.open(archive) as tar:
            tar.extractall(old, filter="data")
        found = {}
        for name, tree in {"before": old, "after": ROOT}.items():
            run(tree, Path(temporary, name), only)
            found[name] = records(Path(temporary, name))
    different = compare(found["before"], found["after"])
    rows = sum(map(len, found["before"].values()))
    for line in different:
        print(line)
    print(f"{len(found['before'])} files, {rows} rows: {len(different)} files differ")
    return 1 if different or not rows else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
