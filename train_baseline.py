"""Train a supervised classifier from the labelled images alone: what pretraining has to beat.

python train_baseline.py --recipe recipes/sample.toml --labels 100
torchrun train_baseline.py --gpus 4 --dataset stl10 --folds
"""

import shlex
from pathlib import Path

import torch

from baseline.baseline import Baseline
from baseline.runs import EXTRA, Job, train_all
from byol.networks import EncoderConfig, build_encoder, parameter_count
from data import datasets
from data.loader import Loader
from eval.classifiers import accuracy
from eval.features import extract
from eval.protocols import record
from training.checkpoints import save_file
from training.command import execute, prepare_start
from training.config import OptimConfig, RunConfig, read_config
from training.distributed import Processes, barrier
from training.run_folder import finished, say, write_json
from training.session import Session
from training.stopping import Watch
from training.weights import initialise, save_encoder

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

    def start(images):
        torch.manual_seed(config.run.seed)
        encoder = build_encoder(config.encoder)
        return encoder, *initialise(encoder, config.encoder, *images.statistics())

    return train_all(config, Job(Baseline, start, processes), train)


def train(config, job: Job, split: datasets.Split, watch: Watch, trials: list = ()) -> dict:
    """Encoder and head on the training images of `split`, measured on its test images.

    The one loop of the baseline and of fine-tuning.  trials: what a sweep before it tried.
    """
    out, processes = Path(config.run.out), job.processes
    if not trials and (result := finished(out, config)):
        return result
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
    with session.folder as folder:
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
        o = config.optim
        more = {"init": e.init, "optimizer": o.optimizer, "lr": o.lr, "steps": session.total}
        more |= job.more
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
    return execute(configure, run, argv, prepare_start)


if __name__ == "__main__":
    main()
