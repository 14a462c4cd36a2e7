"""Pretrain an encoder on unlabelled images with BYOL.

    python train_byol.py --recipe recipes/sample.toml
    torchrun train_byol.py --gpus 4 --dataset stl10 --download
    python train_byol.py --dataset folder --data-root my_images --out runs/mine

`python -m variants.NAME` trains another method with the same code.
"""

import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from byol.byol import BYOL
from core import options
from core.errors import UserError, warn_once
from data import datasets
from data.images import Images
from data.loader import Loader
from data.transform import EvalTransform
from data.views import View2Config, ViewConfig
from eval.online import OnlineEval, held_out_order
from training.command import execute
from training.config import PretrainRun
from training.distributed import Processes
from training.encoder import EncoderConfig, check_sizes, fetch, initialize, measure_statistics
from training.method import Method
from training.optimizers import OptimConfig
from training.run_folder import finished, say, warn
from training.session import Session
from training.stopping import Watch


@dataclass(kw_only=True)
class Config(options.Config):
    """Settings of a pretraining run; `with_method` adds the method's own table."""

    data: datasets.PretrainData
    encoder: EncoderConfig
    view1: ViewConfig
    view2: View2Config
    optim: OptimConfig
    run: PretrainRun


def configure(argv: list[str], method_class: type[Method] = BYOL) -> Config:
    """The settings from the command line."""
    text = __doc__ if method_class is BYOL else sys.modules[method_class.__module__].__doc__
    typed = options.parse(options.with_method(Config, method_class), argv, text)
    return settings(typed, method_class)


def settings(typed: dict, method_class: type[Method] = BYOL) -> Config:
    """The settings from parsed flags, {"optim.lr": 0.2, ...}; fills in the default --out."""
    name = method_class.name
    config = options.make_config(options.with_method(Config, method_class), typed)
    if config.recipe and not (name in config.recipe_tables or method_class.defaults):
        warn_once(f"--recipe {config.recipe}: no table [{name}], so its defaults are used")
    config.run.out = config.run.out or f"runs/{name}-{config.data.dataset}"
    return config


def run(config: Config, processes: Processes, method_class: type[Method] = BYOL) -> dict:
    """Pretrain and write encoder.pt into the run folder; returns the content of result.json."""
    out = Path(config.run.out)
    if result := finished(out, config):
        say(processes, f"{out} is complete; nothing to do")
        return result | {"complete": True}

    # data
    data = datasets.load(config.data)
    images, labels = data.pretraining(config.data.pretrain_on)

    # model
    encoder, transform = start(config.encoder, config.data, images, config.run.seed)
    method = method_class(encoder, config.method)
    if config.run.online_probe:
        method = add_probe(method, data, labels)

    # training
    labels = labels_for(method, data, labels)
    if method.views and (keys := [k for k in config.typed if k.startswith(("view1.", "view2."))]):
        raise UserError(f"{options.flag_of(keys[0])}: {method.name} has views of its own")
    views = method.views or (config.view1, config.view2)
    loader = Loader.of(config, images, labels, views, transform, processes)
    with (
        Session(config, method, loader, transform, processes) as session,
        Watch(processes, config.run.check_every) as session.watch,
    ):
        every, history = config.run.knn_every, session.history()
        online = OnlineEval(data, loader, transform, processes, every, session.total, history)
        height, width = images.shape
        say(
            processes,
            f"{method.name} on {config.data.dataset}: {len(images):,} images of {height}x{width}, "
            f"views of {config.data.crop_size}; {session.describe(config.encoder.init)}",
        )
        result = train(session, online, processes)
        session.finish(result)
    report(result, out, processes)
    return result


def add_probe(method: Method, data: datasets.Dataset, labels) -> Method:
    """The method with a linear probe."""
    if labels is None or labels.max() < 1:
        raise UserError("--online-probe: needs labelled images of two classes or more")
    from eval.probe import OnlineProbe  # other runs start faster without it

    return OnlineProbe(method, len(data.class_names))


def labels_for(method: Method, data: datasets.Dataset, labels):
    """The labels for a method that uses them, with -1 for the images that k-NN holds out."""
    if not method.uses_labels:
        return None
    if labels is None or labels.max() < 0:
        raise UserError(f"{method.name}: needs labelled images, and --pretrain-on has none")
    order, queries = held_out_order(len(data.train_labels))
    labels = labels.copy()
    labels[order[:queries]] = -1  # labelled images come first, see `Dataset.pretraining`
    return labels


def start(encoder: EncoderConfig, data: datasets.DataConfig, images: Images, seed: int):
    """The encoder with the weights of --init, and the EvalTransform for it and the images."""
    torch.manual_seed(seed)
    network, mean, std = initialize(encoder, images)
    transform = EvalTransform.of(data, images.shape, mean, std)
    check_sizes(network, transform, [data.crop_size])
    if encoder.init == "random":
        measure_statistics(network, transform(images.take(images.spread(32))))
    return network, transform


def train(session: Session, online: OnlineEval, processes: Processes) -> dict:
    """Train with online evaluation; returns result.json's content, with the last metrics."""
    metrics = {}
    for step in session.steps():  # forward, backward, optimizer, moving average: training/loop.py
        now = {}
        if online.due(step):
            session.share_buffers()
            now, warnings = online.measure(session.method, step.index)
            metrics = now
            session.folder.clock += online.seconds  # images_per_second is of training alone
            for text in warnings:
                text += f"; try a lower --lr (now {session.config.optim.lr:g})"
                warn(processes, f"step {step.index + 1}: {text}; see docs/evaluation.md")
        session.log(step, **now)
        session.save_if_due(step)
    if online.every and not metrics:  # resumed from the last step's checkpoint
        metrics, _ = online.measure(session.method, session.total - 1)
    return {
        "name": session.method.name,
        "dataset": session.config.data.dataset,
        "steps": session.total,
        **metrics,
        "warnings": online.warnings,
        "seconds": round(session.seconds, 1),
    }


def report(result: dict, out: Path, processes: Processes) -> None:
    """Print the results and the next command."""
    shown = ""
    for metric, words in {"knn_top1": "k-NN", "online_probe_top1": "online probe"}.items():
        if metric in result:
            shown += f"{words} {result[metric]:.2f} % on held-out train images, "
    say(processes, f"{out}/encoder.pt: {shown}{result['seconds']:.0f} s")
    say(processes, f"next: python linear_eval.py --ckpt {shlex.quote(str(out))}")


def prepare(config: Config) -> None:
    """Download the data set, and the published weights that --init names, if missing."""
    config.encoder.check_crop(config.data.crop_size)
    fetch(config.encoder)  # first, since a data set may take hours
    datasets.prepare(config.data)


def main(method_class=BYOL, argv: list[str] | None = None) -> dict:
    """Run from the command line; variants/ call it with their class."""
    settings_of = partial(configure, method_class=method_class)
    return execute(settings_of, partial(run, method_class=method_class), prepare, argv)


if __name__ == "__main__":
    main()
