"""Equal wall-clock on CIFAR-10, one core each: `python -m benchmarks.race --data-root DIR`.

Three arms: lightly's code with the settings of its own CIFAR-10 benchmark, lightly's code with the
recipe of recipes/cifar10_cpu.toml, and this code with that recipe.  All train the same network (the
recipe's narrow ResNet-18), and each schedule ends with the time.  Ours against the second is
speed, the second against the first is recipe.  DIR holds train/CLASS/*, test/CLASS/*.

The runs go two at a time, each tied to a core of its own with one thread; lightly loads without
workers, which would only compete for the same core, from PIL images in memory.  The time counts
from the first step; what a program needs to start is not in it.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.utils import update_momentum
from lightly.transforms.byol_transform import (
    BYOLTransform,
    BYOLView1Transform,
    BYOLView2Transform,
)
from lightly.transforms.simclr_transform import SimCLRTransform
from PIL import Image
from torch.utils.data import DataLoader

import linear_eval
import train_byol
from benchmarks.peers import Lightly, Pictures
from benchmarks.timing import machine
from byol.byol import target_decay
from data import datasets
from training.encoder import build_encoder, save_encoder
from training.method import Method

RECIPE = "recipes/cifar10_cpu.toml"
ARMS = ("lightly", "lightly, our recipe", "ours")
ROOT = Path(train_byol.__file__).parent


def ours(config, minutes: float, out: Path) -> dict:
    """train_byol.py as it is; its number of steps comes from a short trial."""
    words = [sys.executable, "train_byol.py", "--recipe", RECIPE, "--data-root",
             config.data.data_root, "--seed", config.run.seed, "--threads", 1, "--knn-every", 0,
             "--save-every", 0, "--quiet"]  # fmt: skip

    def train(folder: Path, steps: int, *more) -> dict:
        command = [*words, "--out", folder, "--steps", steps, *more]
        subprocess.run(list(map(str, command)), cwd=ROOT, check=True)
        rows = (folder / "metrics.jsonl").read_text().splitlines()
        return {"steps": steps, "rate": json.loads(rows[-1])["images_per_second"]}

    batch = config.optim.batch_size
    count = max(10, int(20 * minutes))
    trial = train(out / "trial", count, "--log-every", count)["rate"]
    found = train(out / "run", int(0.98 * trial * minutes * 60 / batch))
    found["seconds"] = json.loads((out / "run/result.json").read_text())["seconds"]
    return found | {"images": found["steps"] * batch, "ckpt": str(out / "run")}


def lightlys(config, minutes: float, out: Path, its_own: bool) -> dict:
    """lightly's loop for `minutes`; its_own: the settings of its benchmark, else the recipe's."""
    torch.manual_seed(config.run.seed)
    data = datasets.load(config.data)
    images, _ = data.pretraining(config.data.pretrain_on)
    e, b, o = config.encoder, config.byol, config.optim
    encoder = build_encoder(e)
    mean, std = images.statistics()
    if its_own:  # docs/source/getting_started/benchmarks/cifar10_benchmark.py
        size, batch, rate, heads = 32, 128, 0.06, (1024, 256)
        transform = SimCLRTransform(input_size=size, gaussian_blur=0.0)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    else:
        size, batch, rate = config.data.crop_size, o.batch_size, o.lr * o.batch_size / 256
        heads, shared = (b.hidden, b.projection), dict(min_scale=config.view1.area[0])
        shared |= dict(input_size=size, gaussian_blur=0.0, solarization_prob=0.0)
        shared |= dict(normalize={"mean": mean, "std": std})
        transform = BYOLTransform(BYOLView1Transform(**shared), BYOLView2Transform(**shared))
    pictures = images.gather(np.arange(len(images))).permute(0, 2, 3, 1).numpy()
    pictures = Pictures([Image.fromarray(a) for a in pictures], transform)
    loader = DataLoader(pictures, batch_size=batch, shuffle=True, drop_last=True)
    model = Lightly(encoder, encoder.feature_size, *heads)
    criterion, groups = NegativeCosineSimilarity(), Method.parameter_groups(model, 5e-4)
    for group in groups:
        group.pop("adapt", None)
        group["weight_decay"] = 5e-4 if its_own else group["weight_decay"]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9)
    steps, begun, done = 0, time.perf_counter(), 0.0
    while done < 1:
        for x0, x1 in loader:
            # of the time, where a schedule would count steps
            done = (time.perf_counter() - begun) / (60 * minutes)
            if done >= 1:
                break
            decay = 0.99 if its_own else target_decay(b.base_tau, done)
            update_momentum(model.backbone, model.backbone_momentum, m=decay)
            update_momentum(model.projection_head, model.projection_head_momentum, m=decay)
            for group in optimizer.param_groups:
                warm = 1 if its_own else min(1, 10 * done)  # a tenth, about one epoch
                group["lr"] = rate * warm * (1 + math.cos(math.pi * done)) / 2
            p0, z0, p1, z1 = (f(x) for x in (x0, x1) for f in (model, model.forward_momentum))
            loss = 0.5 * (criterion(p0, z1) + criterion(p1, z0))
            (loss if its_own else 4 * loss).backward()  # the paper's scale is four times that
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    seconds = time.perf_counter() - begun
    meta = dict(arch=e.arch, stem=e.stem, width=e.width, mean=mean, std=std, crop_size=size,
                method="byol", seed=config.run.seed)  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    save_encoder(out / "encoder.pt", encoder, meta)
    found = {"steps": steps, "images": steps * batch, "rate": steps * batch / seconds}
    return found | {"seconds": seconds, "ckpt": str(out / "encoder.pt")}


def measure(found: dict, data_root: str) -> dict:
    """Linear evaluation with all labels, and nearest neighbours, on the test images."""
    flags = ["--ckpt", found["ckpt"], "--recipe", RECIPE, "--data-root", data_root, "--quiet"]
    linear = linear_eval.main([*flags, "--overwrite"])
    near = linear_eval.main([*flags, "--overwrite", "--head", "knn"])
    return found | {"linear": linear["top1"], "5-NN": near["cosine_5nn"]}


def folder_of(out: str, arm: str, seed: int) -> Path:
    """Where a run writes; one that is there already is not repeated."""
    return Path(out) / f"{ARMS.index(arm)}-seed{seed}"


def one(options) -> None:
    """One run of one arm on one core; a JSON file tells of it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
    torch.set_num_threads(1)
    flags = ["--recipe", RECIPE, "--data-root", options.data_root, "--seed", str(options.seed)]
    config = train_byol.configure(flags)
    out = folder_of(options.out, options.arm, options.seed)
    if options.arm == "ours":
        found = ours(config, options.minutes, out)
    else:
        found = lightlys(config, options.minutes, out, options.arm == "lightly")
    found |= {"arm": options.arm, "seed": options.seed}
    (out / "found.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", required=True, help="folder with train/CLASS, test/CLASS")
    parser.add_argument("--minutes", type=float, default=20, help="of each run [20]")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each arm [2]")
    parser.add_argument("--out", default="runs/race", help="folder [runs/race]")
    parser.add_argument("--json", help="write the figures")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        return one(options)
    datasets.prepare(train_byol.configure(["--recipe", RECIPE, "--data-root",
                                           options.data_root]).data)  # fmt: skip
    waiting = [
        (arm, seed)
        for seed in range(options.seeds)
        for arm in ARMS
        if not (folder_of(options.out, arm, seed) / "found.json").exists()
    ]
    while waiting:
        pair, waiting = waiting[:2], waiting[2:]
        running = []
        for core, (arm, seed) in enumerate(pair):
            words = [*sys.argv[1:], "--arm", arm, "--seed", str(seed), "--core", str(core)]
            running.append(subprocess.Popen([sys.executable, "-m", "benchmarks.race", *words]))
        if any(process.wait() for process in running):
            raise SystemExit(f"failed: {pair}")
    print(machine())
    found = []
    for path in sorted(Path(options.out).glob("*-seed*/found.json")):
        found.append(measure(json.loads(path.read_text()), options.data_root))
        shown = {k: v for k, v in found[-1].items() if k != "ckpt"}
        print(json.dumps(shown), flush=True)
    if options.json:
        text = json.dumps({"machine": machine(), "minutes": options.minutes, "runs": found})
        Path(options.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
