"""Pretrain an encoder on unlabelled images with BYOL.

    python train_byol.py --recipe recipes/sample.toml
    torchrun train_byol.py --gpus 4 --dataset stl10 --download
    python train_byol.py --dataset folder --data-root my_images --out runs/mine

The same script trains every method of variants/, see there.
"""

import shlex
import sys
from pathlib import Path

import torch

from byol.byol import BYOL
from byol.networks import EncoderConfig, build_encoder, parameter_count
from data import datasets
from data.loader import Loader
from data.views import View2Config, ViewConfig
from eval.held_out import HeldOut, hold_out_labels
from training.command import execute, prepare_start
from training.config import OptimConfig, RunConfig, UserError, read_config
from training.distributed import Processes, barrier
from training.method import OnlineProbe
from training.run_folder import finished, read_metrics, say, warn, write_json
from training.session import Session
from training.stopping import Watch
from training.weights import initialise, save_encoder


def configure(argv: list[str], method_class=BYOL):
    """The settings of a pretraining run, checked as far as that goes without the data."""
    sections = {
        "data": datasets.DataConfig,
        "encoder": EncoderConfig,
        "view1": ViewConfig,
        "view2": View2Config,
        "optim": OptimConfig,
        "run": RunConfig,
        method_class.name: method_class.Config,
    }
    config = read_config(
        argv,
        sections,
        own=method_class.name,
        defaults=method_class.defaults,
        description=__doc__
        if method_class is BYOL
        else sys.modules[method_class.__module__].__doc__,
        hide=("labels", "draw", "fold", "evaluate_on"),
    )
    config.view1.check("view1")
    config.view2.check("view2")
    config.run.out = config.run.out or f"runs/{method_class.name}-{config.data.dataset}"
    return config


def run(config, processes: Processes, method_class=BYOL) -> dict:
    """Pretrain; returns what result.json holds.  The run folder then has encoder.pt."""
    out = Path(config.run.out)
    if result := finished(out, config):
        say(processes, f"{out} is complete; nothing to do")
        return result | {"complete": True}

    # data
    data = datasets.load(config.data)
    images, labels = data.pretraining(config.data.pretrain_on)
    sizes = datasets.evaluation_sizes(config.data, images.shape)

    # model
    torch.manual_seed(config.run.seed)
    e = config.encoder
    encoder = build_encoder(e)
    mean, std = initialise(encoder, e, *images.statistics())
    method = method_class(encoder, config.method)
    if config.run.online_probe:
        if labels is None or labels.max() < 1:
            raise UserError("--online-probe: needs labelled images of two classes or more")
        labels = hold_out_labels(labels, data.train_labels)
        method = OnlineProbe(method, len(data.class_names))

    # loader and optimizer
    labels = labels if method.uses_labels else None
    views = method.views or (config.view1, config.view2)
    loader = Loader.of(config, images, labels, views, (mean, std), processes)
    session = Session(config, method, loader, processes)
    height, width = images.shape
    say(
        processes,
        f"{method.name} on {config.data.dataset}: {len(images):,} images of {height}x{width}, "
        f"views of {config.data.crop_size}; {e.arch}, stem {e.stem}, width {e.width:g}, "
        f"init {e.init}: {parameter_count(method):,} parameters\n{session.describe()}",
    )

    # loop
    before = [row for row in read_metrics(out / "metrics.jsonl") if row["step"] < session.done]
    held_out = HeldOut(data.train, data.train_labels, config.run.knn_every, loader, sizes, before)
    figures = {}
    with session.folder as folder, Watch(processes, config.run.check_every) as watch:
        for step in session.steps():
            now = {}
            if held_out.due(step):
                session.share_buffers()
                told = held_out.alarms(session.total)
                now = figures = held_out.figures(method, processes, step.index)
                folder.pause_clock(held_out.seconds)
                for text in held_out.alarms(session.total)[len(told) :]:
                    warn(processes, f"step {step.index + 1}: {text}; see docs/evaluation.md")
            folder.log(step, config.run.log_every, **now)
            session.save_if_due(step, watch)
            if watch.stop:
                break
        if not session.finished:
            say(processes, f"stopped after step {session.done:,}; go on with --resume")
            return {"stopped": watch.stop}

        # result
        if not figures and held_out.every:  # resumed after the last step
            figures = held_out.figures(method, processes, session.total - 1)
        result = {
            "name": method.name,
            "dataset": config.data.dataset,
            "steps": session.total,
            **figures,
            "warnings": held_out.alarms(session.total),
            "seconds": round(session.seconds, 1),
        }
        if processes.main:
            save_encoder(out / "encoder.pt", method.encoder, session.meta)
            write_json(out / "result.json", result)
        if held_out.every:
            features, known, thumbnails = held_out.embedding(method, processes)
            names = [data.class_names[i] for i in known]
            folder.embed(session.total - 1, features, names, thumbnails)
        barrier()  # what the main process wrote is there for all
    words = {"knn_top1": "k-NN", "online_probe_top1": "online probe"}
    shown = "".join(
        f"{words[k]} {figures[k]:.2f} % on held-out train images, " for k in words if k in figures
    )
    say(processes, f"{out}/encoder.pt: {shown}{result['seconds']:.0f} s")
    say(processes, f"next: python linear_eval.py --ckpt {shlex.quote(str(out))}")
    return result


def main(method_class=BYOL, argv: list[str] | None = None) -> dict:
    """Run from the command line; variants/ call it with their class."""
    return execute(
        lambda args: configure(args, method_class),
        lambda config, processes: run(config, processes, method_class),
        argv,
        prepare_start,
    )


if __name__ == "__main__":
    main()
