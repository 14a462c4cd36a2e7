"""Train a supervised classifier from the labelled images alone: what pretraining has to beat.

python train_baseline.py --recipe recipes/sample.toml --labels 100
torchrun train_baseline.py --gpus 4 --dataset stl10 --folds
"""

import dataclasses
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

from baseline.baseline import Baseline
from byol.networks import Encoder, parameter_count
from data import datasets
from data.loader import Loader
from eval.classifiers import accuracy
from eval.features import extract
from eval.protocols import over_folds, record
from training.checkpoints import save_file
from training.command import execute
from training.config import EncoderConfig, OptimConfig, RunConfig, read_config
from training.distributed import Processes, barrier
from training.run_folder import say, write_json
from training.session import Session
from training.stopping import Watch
from training.weights import initialise, save_encoder

HIDE = ("pretrain_on", "knn_every", "online_probe")
# As in recipes/stl10.toml: plain SGD, and steps instead of epochs, since labels are few.
DEFAULTS = {
    "optim": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "batch_size": 100, "steps": 5000}
}
SWEEP = (
    ("--sweep",),
    dict(action="store_true", help="choose rate and epochs on a fifth of the training labels"),
)
EXTRA = (SWEEP, datasets.FOLDS)


def configure(argv: list[str]):
    """The settings of a baseline run."""
    sections = {
        "data": datasets.DataConfig,
        "encoder": EncoderConfig,
        "optim": OptimConfig,
        "run": RunConfig,
        "baseline": Baseline.Config,
    }
    config = read_config(
        argv,
        sections,
        own="baseline",
        defaults=DEFAULTS,
        description=__doc__,
        extra=EXTRA,
        hide=HIDE,
    )
    config.run.out = config.run.out or f"runs/baseline-{config.data.dataset}"
    return config


def run(config, processes: Processes) -> dict:
    """Train from --init on the labelled images; returns what result.json holds."""

    def start(images):
        torch.manual_seed(config.run.seed)
        e = config.encoder
        encoder = Encoder(e.arch, e.stem, e.width, e.zero_init)
        return encoder, *initialise(encoder, e, *images.statistics())

    return train_all(config, processes, Job(Baseline, start))


@dataclass
class Job:
    """What the baseline and fine-tuning differ in.

    start   function of the training images: a new encoder, mean and std of its inputs
    more    what else result.json says
    """

    method_class: type
    start: Callable
    more: dict = field(default_factory=dict)


def train_all(config, processes, job: Job) -> dict:
    """The one run that is asked for; with --folds ten of them, with --sweep a grid before each."""
    data, out = datasets.load(config.data), Path(config.run.out)
    results = []
    for own in datasets.each_fold(config.data, config.folds):
        folder = out / f"fold{own.fold}" if config.folds else out
        settings = with_(config, data=own, run=dataclasses.replace(config.run, out=str(folder)))
        split, trials = data.evaluation(own), []
        if config.sweep:
            settings, trials = sweep(settings, processes, job, split.train)
        if not trials or "stopped" not in trials[-1]:
            results.append(train(settings, processes, job, split, trials))
        if "stopped" in (last := (results or trials)[-1]):
            return last
    if not config.folds:
        return results[0]
    result = over_folds(results)
    if processes.main:
        write_json(out / "result.json", result)
    say(processes, f"{out}: top-1 {result['top1']:.2f} % ± {result['top1_std']:.2f} over 10 folds")
    return result


def with_(config, **sections) -> SimpleNamespace:
    """The same settings with other sections."""
    return SimpleNamespace(**vars(config) | sections)


def sweep(config, processes, job: Job, labelled: datasets.Labelled):
    """Rate x epochs on a held-out fifth of `labelled`: (settings with the best, the trials).

    It gets no test images.  The last trial says so where the run was stopped.
    """
    m, part, trials = config.method, labelled.hold_out(), []
    cuts = processes.world_size * config.optim.accumulate
    size = min(config.optim.batch_size, len(part.train) // cuts * cuts)
    grid = [dict(lr=r, epochs=e, steps=0) for r in m.sweep_lr for e in m.sweep_epochs]
    for choice in grid:
        folder = f"{config.run.out}/sweep/lr{choice['lr']:g}-epochs{choice['epochs']}"
        own = with_(
            config,
            data=dataclasses.replace(config.data, evaluate_on="validation"),
            optim=dataclasses.replace(config.optim, **choice, batch_size=size),
            run=dataclasses.replace(config.run, out=folder),
        )
        result = train(own, processes, job, part)
        if "stopped" in result:
            return config, [result]
        trials.append({**choice, "held_out_top1": result["top1"]})
    best = grid[max(range(len(grid)), key=lambda i: trials[i]["held_out_top1"])]
    return with_(config, optim=dataclasses.replace(config.optim, **best)), trials


def train(config, processes, job: Job, split: datasets.Split, trials: list = ()) -> dict:
    """Encoder and head on the training images of `split`, measured on its test images.

    The one loop of the baseline and of fine-tuning.  trials: what a sweep before it tried.
    """
    out = Path(config.run.out)
    if config.run.resume and (out / "result.json").exists():
        say(processes, f"{out} is complete; nothing to do")
        return json.loads((out / "result.json").read_text()) | {"complete": True}

    encoder, mean, std = job.start(split.train.images)
    sizes = datasets.evaluation_sizes(config.data, split.test.images.shape)

    # model, loader and optimizer
    e = config.encoder
    method = job.method_class(encoder, config.method, len(split.train.class_names))
    images, labels = split.train.images, split.train.labels
    loader = Loader.of(config, images, labels, method.views, (mean, std), processes)
    session = Session(config, method, loader, processes)
    say(
        processes,
        f"{method.name} on {config.data.dataset}: {len(split.train):,} labelled images, "
        f"{len(split.test):,} {config.data.evaluate_on} images; {e.arch}, stem {e.stem}, width "
        f"{e.width:g}, init {e.init}: {parameter_count(method):,} parameters\n"
        f"{session.describe()}",
    )

    # loop
    with session.folder as folder, Watch(processes, config.run.check_every) as watch:
        for step in session.steps():
            folder.log(step, config.run.log_every)
            session.save_if_due(step, watch)
            if watch.stop:
                break
        if not session.finished:
            say(processes, f"stopped after step {session.done:,}; go on with --resume")
            return {"stopped": watch.stop}

        # result
        features = extract(method.encoder, split.test.images, mean, std, sizes, processes)
        top1 = accuracy(method.head.cpu()(features), split.test.labels)
        more = {"init": e.init, "lr": config.optim.lr, "steps": session.total, **job.more}
        more |= {"seconds": round(session.seconds, 1)}
        more |= {"trials": trials} if trials else {}
        protocol = "network-sweep" if trials else "network"
        result = record(protocol, method.name, config, split, top1, **more)
        if processes.main:
            save_encoder(out / "encoder.pt", method.encoder, session.meta)
            classifier = {"encoder": method.encoder.state_dict(), "head": method.head.state_dict()}
            classifier |= {"meta": session.meta, "classes": split.train.class_names}
            save_file(out / "classifier.pt", classifier)
            write_json(out / "result.json", result)
        barrier()  # what the main process wrote is there for all
    say(
        processes,
        f"{out}: top-1 {top1:.2f} % on {len(split.test):,} {config.data.evaluate_on} images with "
        f"{len(split.train):,} labels, {result['seconds']:.0f} s\n"
        f"next: tensorboard --logdir {shlex.quote(str(out))}",
    )
    return result


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, argv)


if __name__ == "__main__":
    main()
