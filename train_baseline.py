"""Train a supervised classifier from the labelled images alone: what pretraining has to beat.

python train_baseline.py --recipe recipes/sample.toml --labels 100
torchrun train_baseline.py --gpus 4 --dataset stl10
"""

import time
from pathlib import Path

import torch

from baseline.baseline import Baseline
from byol.networks import Encoder, parameter_count
from data import datasets
from data.loader import Loader
from eval.classifiers import accuracy
from eval.features import extract
from training import distributed
from training.checkpoints import Checkpoints, restore, resume_state, save_file, training_state
from training.command import execute
from training.config import EncoderConfig, OptimConfig, RunConfig, as_dict, read_config
from training.loop import train_steps
from training.optimizers import build_optimizer
from training.precision import Precision, pick_precision
from training.run_folder import RunFolder, git_commit, say, write_json
from training.schedules import peak_rate, warmup_steps
from training.stopping import Watch
from training.weights import initialise, save_encoder

HIDE = ("pretrain_on", "knn_every", "online_probe")
# A supervised network of a few thousand labels: plain SGD, and steps instead of epochs.
DEFAULTS = {"optim": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "batch_size": 50,
                      "steps": 2000}}  # fmt: skip


def configure(argv: list[str]):
    """The settings of a baseline run."""
    sections = {"data": datasets.DataConfig, "encoder": EncoderConfig, "optim": OptimConfig,
                "run": RunConfig, "baseline": Baseline.Config}  # fmt: skip
    config = read_config(argv, sections, own="baseline", defaults=DEFAULTS,
                         description=__doc__, hide=HIDE)  # fmt: skip
    config.run.out = config.run.out or f"runs/baseline-{config.data.dataset}"
    return config


def run(config, processes: distributed.Processes) -> dict:
    """Train from --init on the labelled images; returns what result.json holds."""
    data = datasets.load(config.data)
    split = data.evaluation(config.data)
    torch.manual_seed(config.run.seed)
    e = config.encoder
    encoder = Encoder(e.arch, e.stem, e.width, e.zero_init)
    mean, std = initialise(encoder, e, *split.train.statistics())
    return train(config, processes, Baseline, encoder, split, data.class_names, mean, std)


def train(config, processes, method_class, encoder, split, class_names, mean, std) -> dict:
    """Encoder and head on the labelled images of `split`, measured on its test images.

    The one loop of the baseline and of fine-tuning; they differ in the encoder they come with.
    """
    out, started = Path(config.run.out), time.perf_counter()
    if config.run.resume and (out / "result.json").exists():
        say(processes, f"{out} is complete; nothing to do")
        return {"complete": True}

    # model
    e, o = config.encoder, config.optim
    method = method_class(encoder, config.method, len(class_names))
    if config.run.compile:
        method.compile()
    loader = Loader(
        split.train, split.train_labels, method.views, config.data.crop_size, o.batch_size, mean,
        std, config.run.seed, o.accumulate, processes.rank, processes.world_size, processes.device,
    )  # fmt: skip
    total = o.total_steps(loader.steps_per_epoch)
    meta = {"arch": e.arch, "stem": e.stem, "width": e.width, "mean": mean, "std": std,
            "crop_size": config.data.crop_size, "init": e.init, "method": method.name,
            "seed": config.run.seed, "commit": git_commit()}  # fmt: skip
    model = distributed.wrap(method, processes, config.run.batch_norm)

    # optimizer
    optimizer = build_optimizer(o.optimizer, method.parameter_groups(o.weight_decay), o.momentum)
    precision = Precision(pick_precision(config.run.precision, processes.device), processes.device)
    peak = peak_rate(o.optimizer, o.lr, o.batch_size)
    checkpoints = Checkpoints(out / "checkpoints", config.run.save_every, config.run.keep)
    folder = RunFolder(out, as_dict(config), processes, resume=bool(config.run.resume),
                       overwrite=config.run.overwrite)  # fmt: skip
    state = resume_state(checkpoints, config.run.resume, config, method)
    start = restore(state, method, optimizer, precision) if state else 0
    stop = min(config.run.stop_after or total, total)
    say(processes, f"{method.name} on {config.data.dataset}: {len(split.train):,} labelled images, "
        f"{len(split.test):,} {config.data.evaluate_on} images; {e.arch}, stem {e.stem}, width "
        f"{e.width:g}, init {e.init}: {parameter_count(method):,} parameters\n"
        f"{processes.world_size} x {processes.device.type}, {precision.name}; {total - start:,} "
        f"steps of {o.batch_size}, {o.optimizer}, learning rate {peak:g}")  # fmt: skip

    # loop
    with folder, Watch(processes, config.run.check_every) as watch:
        folder.begin(start, stop, method.name, o.batch_size)
        for step in train_steps(model, loader, optimizer, precision, peak=peak, total=total,
                                warmup=warmup_steps(o.warmup_epochs, loader.steps_per_epoch, total),
                                start=start, stop=stop):  # fmt: skip
            folder.log(step, config.run.log_every)
            due = checkpoints.due(step) or step.index == stop - 1
            watch.look(step, method, saving=due)
            if due or watch.stop or watch.save:
                if config.run.batch_norm == "local":
                    distributed.broadcast_buffers(method)
                if processes.main:
                    checkpoints.save(step.index + 1, training_state(
                        method, optimizer, precision, as_dict(config), meta))  # fmt: skip
            if watch.stop:
                break
        if not step.last:
            say(processes, f"stopped after step {step.index + 1} of {total}; go on with --resume")
            return {"stopped": watch.stop}

        # result
        sizes = datasets.evaluation_sizes(config.data, split.test.shape)
        features = extract(method.encoder, split.test, mean, std, sizes, device=processes.device,
                           rank=processes.rank, world_size=processes.world_size)  # fmt: skip
        logits = method.head.cpu()(features)
        result = {
            "name": method.name, "dataset": config.data.dataset, "init": e.init,
            "top1": round(accuracy(logits, split.test_labels), 4), "labels": len(split.train),
            "draw": config.data.draw, "fold": config.data.fold, "steps": total,
            "measured_on": config.data.evaluate_on, "images": len(split.test),
            "seconds": round(time.perf_counter() - started, 1),
        }  # fmt: skip
        if processes.main:
            save_encoder(out / "encoder.pt", method.encoder, meta | {"step": total})
            save_file(out / "classifier.pt", {"encoder": method.encoder.state_dict(),
                      "head": method.head.state_dict(), "meta": meta, "classes": class_names})  # fmt: skip
            write_json(out / "result.json", result)
    say(processes, f"{out}: top-1 {result['top1']:.2f} % on {result['images']:,} "
        f"{result['measured_on']} images with {result['labels']:,} labels, {result['seconds']:.0f} s")  # fmt: skip
    return result


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, argv)


if __name__ == "__main__":
    main()
