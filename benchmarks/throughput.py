"""How near training is to the limit of this machine: `python -m benchmarks.throughput`.

Rows: training against the bare step; linear evaluation against its forward passes; the first step
after typing a command; memory; two processes against one.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import linear_eval
import train_byol
from benchmarks import timing
from byol.byol import BYOL
from data import stl10
from data.images import Images
from data.loader import Loader
from data.transform import EvalTransform
from training.distributed import start
from training.encoder import Encoder, save_encoder
from training.session import Session
from training.stopping import Watch

ROOT = Path(train_byol.__file__).parent
# side: batch, stem, flags as a user would type them
SIZES = {96: (64, "imagenet", "--byol.hidden 1024"), 32: (128, "imagenet", "--byol.hidden 1024")}
TINY = {side: (8, stem, "--byol.hidden 16") for side, (_, stem, _) in SIZES.items()}
if "--tiny" in sys.argv:
    SIZES = TINY


MEAN, STD = [0.45, 0.44, 0.41], [0.26, 0.26, 0.27]


def photographs(count: int, side: int) -> np.ndarray:
    """(count, 3, side, side) uint8 with soft shapes, the same at each call."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.integers(0, 256, (count, 3, 8, 8)).astype(np.float32))
    fine = torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 255)
    return fine.byte().numpy()


def settings(side: int, *flags: str):
    """(configuration of train_byol.py, batch size)"""
    batch, stem, own = SIZES[side]
    shared = f"--crop-size {side} --stem {stem} --batch-size {batch} --optimizer sgd --quiet"
    return train_byol.configure([*shared.split(), *own.split(), *flags]), batch


class Training:
    """Our training as the script does it, a few steps at a time, and its bare step."""

    def __init__(self, side: int, images: int, out: str, steps: int, *flags: str) -> None:
        self.steps = steps
        config, self.batch = settings(side, "--out", out, "--steps", "100000", *flags)
        r = config.run
        processes = start(r.device, r.threads, r.dist_timeout, quiet=True)
        torch.manual_seed(0)
        encoder = Encoder(config.encoder.arch, config.encoder.stem)
        method = BYOL(encoder, config.method)
        data = Images([photographs(images, side)])
        views = (config.view1, config.view2)
        transform = EvalTransform(MEAN, STD, stored=side)
        loader = Loader.of(config, data, None, views, transform, processes)
        watch = Watch(processes, r.check_every)
        self.session = Session(config, method, loader, transform, processes, watch)
        self.iterator = self.session.steps()
        self.config, self.loader = config, loader

    @functools.cached_property
    def fixed(self):
        """The views that the bare step sees again and again."""
        return next(self.loader.batches(0))[0]

    def __call__(self) -> int:
        """Steps of the loop of train_byol.py."""
        for _ in range(self.steps):
            step = next(self.iterator)
            self.session.log(step)
            self.session.save_if_due(step)
        synchronise()
        return self.steps * self.batch

    def bare(self) -> int:
        """The same network on the same tensors again and again: no data, no records, no checks."""
        s, views = self.session, self.fixed
        for _ in range(self.steps):
            with s.precision.autocast():
                outputs = s.model(*views)
            loss, _ = s.method.loss({k: v.float() for k, v in outputs.items()})
            s.precision.backward(loss)
            s.precision.step(s.optimizer)
            s.optimizer.zero_grad(set_to_none=True)
            s.method.after_step(0.5)
        synchronise()
        return self.steps * self.batch

    def views(self) -> int:
        """What the loader does for a step."""
        next(self.loader.batches(0))
        synchronise()
        return self.batch

    def kept(self) -> int:
        """Bytes that the forward pass of a step keeps for the backward pass, weights left out."""
        own = {p.untyped_storage().data_ptr() for p in self.session.method.parameters()}
        found, views = {}, self.fixed

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with self.session.precision.autocast():
                outputs = self.session.model(*views)
        del outputs
        return sum(size for address, size in found.items() if address not in own)

    def close(self) -> None:
        """Give the run folder back."""
        self.session.folder.close()


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def training(options):
    """Training / bare step, views included."""
    for side in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            ours = Training(side, 1024, f"{folder}/run", 1 if options.tiny else 320 // side)
            rates = timing.alternate({"training": ours, "bare step": ours.bare}, options.rounds)
            precision = ours.session.precision.name
            ours.close()
        what = f"training / bare step, {side} px, {precision}"
        yield timing.row(what, rates, "training", "bare step")


# operators by what they belong to, the first that fits
KINDS = {"convolution": ("conv",), "batch norm": ("batch_norm",), "ReLU, pooling": (
    "relu", "threshold", "pool"), "heads": ("mm", "linear"), "optimizer, target": (
    "_foreach", "add_", "mul_", "lerp", "zero_")}  # fmt: skip


def profile(options):
    """Of one bare step: shares of its time, FLOPs and kept activations of an image, their rate."""
    for side in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            ours = Training(side, 256, f"{folder}/run", 1)
            ours(), ours.bare()
            rates = timing.alternate({"step": ours.bare}, options.rounds)["step"]
            views = timing.alternate({"views": ours.views}, options.rounds)["views"]
            with FlopCounterMode(display=False) as counter:
                ours.bare()
            giga = counter.get_total_flops() / ours.batch / 1e9
            with torch.profiler.profile() as profiler:
                ours.bare()
            kept, dtype = ours.kept(), ours.session.precision.dtype or torch.float32
            ours.close()
        device = "device" if torch.cuda.is_available() else "cpu"
        total = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in profiler.key_averages():
            fits = (k for k, words in KINDS.items() if any(w in event.key for w in words))
            total[next(fits, "other")] += getattr(event, f"self_{device}_time_total")
        whole, rate = sum(total.values()), statistics.median(rates)
        yield {
            "what": f"profile, {side} px",
            "GFLOP an image": giga,
            "MB kept an image": kept / ours.batch / 1e6,
            "GFLOP/s": giga * rate,
            "GFLOP/s of a matrix product": matrix_product(dtype),
            "views, % of a step": 100 * rate / (rate + statistics.median(views)),
            **{f"{kind}, % of the bare step": 100 * t / whole for kind, t in total.items()},
        }


def matrix_product(dtype, size: int = 2048) -> float:
    """GFLOP/s of a large product of square matrices: about what this machine can do."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.rand(size, size, dtype=dtype, device=device)

    def work() -> int:
        a @ a
        synchronise()
        return 2 * size**3

    return statistics.median(timing.alternate({"product": work}, 20)["product"]) / 1e9


def write_stl10(root: Path, train: int, test: int, unlabelled: int) -> list[str]:
    """STL-10's files; the unlabelled one has no bytes on the disk.  The flags that choose it."""
    folder = root / stl10.FOLDER
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("test", test)):
        photographs(count, 96).transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")
        (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    with open(folder / "unlabeled_X.bin", "wb") as file:
        file.truncate(unlabelled * stl10.IMAGE)
    (folder / "class_names.txt").write_text(" ".join(map(str, range(10))))
    (folder / "fold_indices.txt").write_text("0 1\n" * 10)
    return ["--dataset", "stl10", "--data-root", str(root)]


def evaluation(options):
    """linear_eval.py without its imports against the encoder's forward passes."""
    train, test = (20, 20) if options.tiny else (5000, 8000)
    with tempfile.TemporaryDirectory() as folder:
        flags = write_stl10(Path(folder), train, test, 10 if options.tiny else 100_000)
        encoder = Encoder("resnet18", "imagenet").to(memory_format=torch.channels_last)
        meta = {"arch": "resnet18", "stem": "imagenet", "width": 1.0, "crop_size": 96}
        meta |= {"mean": MEAN, "std": STD, "method": "byol", "seed": 0}
        save_encoder(Path(folder) / "encoder.pt", encoder, meta)
        flags += ["--ckpt", f"{folder}/encoder.pt", "--overwrite", "--quiet"]
        ready = torch.rand(256, 3, 96, 96).contiguous(memory_format=torch.channels_last)

        def script() -> int:
            linear_eval.main([*flags, "--out", f"{folder}/linear"])
            return train + test

        @torch.no_grad()
        def forward() -> int:
            encoder.eval()
            for first in range(0, train + test, 256):
                encoder(ready[: train + test - first])
            return train + test

        rates = timing.alternate({"script": script, "forward": forward}, min(options.rounds, 3))
    yield timing.row(
        f"linear evaluation / forward, {train + test} images", rates, "script", "forward"
    )


def command(folder: Path, *flags: str, steps: int, size: int = 96) -> tuple[float, float]:
    """(seconds until the first step is done, anonymous MiB after `steps`) of a typed command."""
    out, (batch, stem, own) = folder / f"run{time.time_ns()}", SIZES[size]
    words = [sys.executable, "train_byol.py", "--out", out, *flags, *own.split(), "--stem", stem]
    words += ["--batch-size", batch, "--log-every", 1, "--steps", steps + 1000, "--quiet"]
    begun = time.perf_counter()
    process = subprocess.Popen(list(map(str, words)), cwd=ROOT)
    path, first = out / "metrics.jsonl", 0.0
    while process.poll() is None:
        rows = path.read_text().count("\n") if path.exists() else 0
        first = first or (time.perf_counter() - begun) * bool(rows)
        if rows >= steps:
            anonymous = timing.memory_of(process.pid, "RssAnon")
            process.kill()
            process.wait()
            return first, anonymous
        time.sleep(0.02)
    raise SystemExit("train_byol.py ended early")


def start_up(options):
    """Seconds from typing the command to the first optimizer step; packed data."""
    with tempfile.TemporaryDirectory() as folder:
        flags = write_stl10(Path(folder), 100, 100, 5000)
        rounds = 1 if options.tiny else options.rounds
        seconds = [command(Path(folder), *flags, steps=1)[0] for _ in range(rounds)]
    yield {"what": "first step after typing, s", "median": statistics.median(seconds),
           "lowest": min(seconds), "highest": max(seconds)}  # fmt: skip


def memory(options):
    """Anonymous memory with STL-10's 100,000 unlabelled images against 1,000."""
    anonymous = {}
    for count in (1000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            flags = write_stl10(Path(folder), 100, 100, count)
            steps = 1 if options.tiny else 6
            anonymous[count] = command(Path(folder), *flags, steps=steps)[1]
    yield {"what": "anonymous memory, MiB", "1,000 images": anonymous[1000],
           "100,000 images": anonymous[100_000],
           "difference": anonymous[100_000] - anonymous[1000]}  # fmt: skip


def processes(options):
    """Two processes of one thread against one of two, the same global batch."""
    steps = 2 if options.tiny else 12
    with tempfile.TemporaryDirectory() as folder:
        data = write_stl10(Path(folder), 100, 100, 1000)
        batch, stem, own = SIZES[96]
        shared = [sys.executable, "train_byol.py", *data, *own.split(), "--stem", stem,
                  "--batch-size", str(batch), "--device", "cpu", "--quiet", "--overwrite",
                  "--log-every", "4", "--steps", str(steps), "--save-every", "0"]  # fmt: skip

        def rate(*flags: str) -> float:
            out = f"{folder}/run"
            subprocess.run([*shared, "--out", out, *flags], cwd=ROOT, check=True)
            rows = [json.loads(t) for t in Path(f"{out}/metrics.jsonl").read_text().splitlines()]
            return statistics.median(r["images_per_second"] for r in rows[1:])

        sides = {
            "one": ["--threads", "2"],
            "two, local": ["--gpus", "2", "--threads", "1", "--batch-norm", "local"],
            "two, sync": ["--gpus", "2", "--threads", "1"],
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(1 if options.tiny else min(options.rounds, 3)):
            for name, flags in sides.items():
                rates[name].append(rate(*flags))
    for name in ("two, local", "two, sync"):
        yield timing.row(f"{name} / one process", rates, name, "one")


ROWS = {"training": training, "profile": profile, "evaluation": evaluation, "start": start_up,
        "memory": memory, "processes": processes}  # fmt: skip

if __name__ == "__main__":
    if "--peak" in sys.argv:  # for the row of benchmarks/peers.py
        with tempfile.TemporaryDirectory() as folder:
            Training(96, 1024, f"{folder}/run", 10)()
    else:
        timing.main(__doc__, ROWS)
