"""Train a supervised classifier from the labelled images alone: what pretraining has to beat.

python train_baseline.py --recipe recipes/sample.toml --labels 100
torchrun train_baseline.py --gpus 4 --dataset stl10
"""

import shlex
from pathlib import Path

import torch

from baseline.baseline import Baseline
from byol.networks import Encoder, parameter_count
from data import datasets
from data.loader import Loader
from eval.classifiers import accuracy
from eval.features import extract
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
        argv, sections, own="baseline", defaults=DEFAULTS, description=__doc__, hide=HIDE
    )
    config.run.out = config.run.out or f"runs/baseline-{config.data.dataset}"
    return config


def run(config, processes: Processes) -> dict:
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
    out = Path(config.run.out)
    if config.run.resume and (out / "result.json").exists():
        say(processes, f"{out} is complete; nothing to do")
        return {"complete": True}

    sizes = datasets.evaluation_sizes(config.data, split.test.shape)

    # model, loader and optimizer
    e = config.encoder
    method = method_class(encoder, config.method, len(class_names))
    loader = Loader(
        images=split.train,
        labels=split.train_labels,
        views=method.views,
        crop_size=config.data.crop_size,
        batch_size=config.optim.batch_size,
        accumulate=config.optim.accumulate,
        mean=mean,
        std=std,
        seed=config.run.seed,
        processes=processes,
    )
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
        features = extract(method.encoder, split.test, mean, std, sizes, processes)
        top1 = accuracy(method.head.cpu()(features), split.test_labels)
        result = {
            "name": method.name,
            "dataset": config.data.dataset,
            "init": e.init,
            "top1": round(top1, 4),
            "labels": len(split.train),
            "draw": config.data.draw,
            "fold": config.data.fold,
            "measured_on": config.data.evaluate_on,
            "images": len(split.test),
            "steps": session.total,
            "seconds": round(session.seconds, 1),
        }
        if processes.main:
            save_encoder(out / "encoder.pt", method.encoder, session.meta)
            classifier = {"encoder": method.encoder.state_dict(), "head": method.head.state_dict()}
            classifier |= {"meta": session.meta, "classes": class_names}
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
