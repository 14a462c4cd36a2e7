"""Train a supervised classifier from the labelled images alone: what pretraining has to beat.

python train_baseline.py --recipe recipes/sample.toml --labels 100
torchrun train_baseline.py --gpus 4 --dataset stl10 --folds
"""

import shlex
from functools import partial
from pathlib import Path

import train_byol
from baseline.baseline import Baseline
from core.options import RunConfig, read_config
from data import datasets
from data.labelled import Split
from data.loader import Loader
from eval.classifiers import accuracy
from eval.features import extract
from eval.protocols import record
from eval.supervised import EXTRA, Job, train_all
from training.command import execute
from training.distributed import Processes
from training.encoder import EncoderConfig
from training.optimizers import OptimConfig
from training.run_folder import finished, say
from training.session import Session
from training.stopping import Watch

HIDE = ("pretrain_on", "knn_every", "online_probe")
SKIP = ("optim",)  # a recipe's [optim] is pretraining's; labelled training has its own tables
# As in recipes/stl10.toml: plain SGD, and steps instead of epochs, since labels are few.
DEFAULTS = {
    "optim": dict(
        optimizer="sgd", lr=0.1, weight_decay=5e-4, batch_size=100, steps=5000, warmup_epochs=0
    )
}


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
        skip=SKIP,
    )
    kind = "-sweep" * config.sweep + "-folds" * config.folds
    config.run.out = config.run.out or f"runs/baseline-{config.data.dataset}{kind}"
    return config


def run(config, processes: Processes) -> dict:
    """Train from --init on the labelled images; returns what result.json holds."""

    begin = partial(train_byol.start, config.encoder, config.data, seed=config.run.seed)
    return train_all(config, Job(Baseline, begin, processes), train)


def train(config, job: Job, split: Split, watch: Watch, trials: list = ()) -> dict:
    """Encoder and head on the training images of `split`, measured on its test images.

    The one loop of the baseline and of fine-tuning.  trials: what a sweep before it tried.
    """
    out, processes = Path(config.run.out), job.processes
    if not trials and (result := finished(out, config)):
        return result
    images, labels, classes = split.train.images, split.train.labels, split.train.class_names
    encoder, transform = job.start(images)
    method = job.method_class(encoder, config.method, len(classes))
    loader = Loader.of(config, images, labels, method.views, transform, processes)
    with Session(config, method, loader, transform, processes, watch) as session:
        say(
            processes,
            f"{method.name} on {config.data.dataset}: {len(split.train):,} labelled images, "
            f"{len(split.test):,} {config.data.evaluate_on} images; {session.describe()}",
        )
        for step in session.steps():
            session.log(step)
            session.save_if_due(step)
        features = extract(method.encoder, split.test.images, transform, processes)
        top1 = accuracy(method.head.cpu()(features), split.test.labels)
        result = result_of(config, job, split, session, top1, trials)
        session.finish(result, lambda: classifier_of(session, classes))
    say(
        processes,
        f"{out}: top-1 {top1:.2f} % on {len(split.test):,} {config.data.evaluate_on} images with "
        f"{len(split.train):,} labels, {result['seconds']:.0f} s\n"
        f"next: tensorboard --logdir {shlex.quote(str(out))}",
    )
    return result


def classifier_of(session: Session, classes: list[str]) -> dict:
    """What classifier.pt holds."""
    network = {name: getattr(session.method, name).state_dict() for name in ("encoder", "head")}
    return network | {"meta": session.meta, "classes": classes}


def result_of(config, job: Job, split: Split, session: Session, top1: float, trials: list) -> dict:
    """What result.json holds."""
    o = config.optim
    more = {"init": config.encoder.init, "optimizer": o.optimizer, "lr": o.lr}
    more |= {"steps": session.total, **job.more, "seconds": round(session.seconds, 1)}
    more |= {"trials": trials} if trials else {}
    protocol = "network-sweep" if trials else "network"
    return record(protocol, session.method.name, config, split, top1, **more)


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, train_byol.prepare, argv)


if __name__ == "__main__":
    main()
