"""Pretrain an encoder on unlabelled images with BYOL.

    python train_byol.py --recipe recipes/sample.toml
    torchrun train_byol.py --gpus 4 --dataset stl10 --download
    python train_byol.py --dataset folder --data-root my_images --out runs/mine

The same script trains every method of variants/, see there.
"""

import time
from pathlib import Path

import torch

from byol.byol import BYOL
from byol.networks import Encoder, parameter_count
from data import datasets
from data.loader import Loader
from data.views import View2Config, ViewConfig
from eval.knn import HeldOutKNN
from training import distributed
from training.checkpoints import Checkpoints, restore, resume_state, training_state
from training.command import execute
from training.config import EncoderConfig, OptimConfig, RunConfig, UserError, as_dict, read_config
from training.loop import train_steps
from training.method import OnlineProbe
from training.optimizers import build_optimizer
from training.precision import Precision, pick_precision
from training.run_folder import RunFolder, git_commit, say, write_json
from training.schedules import peak_rate, warmup_steps
from training.stopping import Watch
from training.weights import initialise, save_encoder


def configure(argv: list[str], method_class=BYOL):
    """The settings of a pretraining run, checked as far as that goes without the data."""
    sections = {"data": datasets.DataConfig, "encoder": EncoderConfig, "view1": ViewConfig,
                "view2": View2Config, "optim": OptimConfig, "run": RunConfig,
                method_class.name: method_class.Config}  # fmt: skip
    config = read_config(
        argv, sections, own=method_class.name, defaults=method_class.defaults, description=__doc__,
        hide=("labels", "draw", "fold", "evaluate_on"),
    )  # fmt: skip
    config.view1.check("view1")
    config.view2.check("view2")
    config.run.out = config.run.out or f"runs/{method_class.name}-{config.data.dataset}"
    return config


def run(config, processes: distributed.Processes, method_class=BYOL) -> dict:
    """Pretrain; returns what result.json holds.  The run folder then has encoder.pt."""
    out, main_process = Path(config.run.out), processes.main
    if config.run.resume and (out / "result.json").exists():
        say(processes, f"{out} is complete; nothing to do")
        return {"complete": True}
    started = time.perf_counter()

    # data
    data = datasets.load(config.data)
    images, labels = data.pretraining(config.data.pretrain_on)

    # model
    torch.manual_seed(config.run.seed)
    e = config.encoder
    encoder = Encoder(e.arch, e.stem, e.width, e.zero_init)
    mean, std = initialise(encoder, e, *images.statistics())
    method = method_class(encoder, config.method)
    if config.run.online_probe:
        if labels is None or labels.max() < 0:
            raise UserError("--online-probe: these images have no labels")
        method = OnlineProbe(method, len(data.class_names))
    if config.run.compile:
        method.compile()
    loader = Loader(
        images, labels if method.uses_labels else None, method.views or (config.view1, config.view2),
        config.data.crop_size, config.optim.batch_size, mean, std, config.run.seed,
        config.optim.accumulate, processes.rank, processes.world_size, processes.device,
    )  # fmt: skip
    total = config.optim.total_steps(loader.steps_per_epoch)
    meta = {"arch": e.arch, "stem": e.stem, "width": e.width, "mean": mean, "std": std,
            "crop_size": config.data.crop_size, "init": e.init, "method": method.name,
            "seed": config.run.seed, "commit": git_commit()}  # fmt: skip
    model = distributed.wrap(method, processes, config.run.batch_norm)

    # optimizer
    o = config.optim
    optimizer = build_optimizer(o.optimizer, method.parameter_groups(o.weight_decay), o.momentum)
    precision = Precision(pick_precision(config.run.precision, processes.device), processes.device)
    peak = peak_rate(o.optimizer, o.lr, o.batch_size)
    checkpoints = Checkpoints(out / "checkpoints", config.run.save_every, config.run.keep)
    folder = RunFolder(out, as_dict(config), processes, resume=bool(config.run.resume),
                       overwrite=config.run.overwrite)  # fmt: skip
    state = resume_state(checkpoints, config.run.resume, config, method)
    start = restore(state, method, optimizer, precision) if state else 0
    stop = min(config.run.stop_after or total, total)
    say(processes, f"{method.name} on {config.data.dataset}: {len(images):,} images of "
        f"{images.shape[0]}x{images.shape[1]}, views of {config.data.crop_size}; {e.arch}, stem "
        f"{e.stem}, width {e.width:g}, init {e.init}: {parameter_count(method):,} parameters\n"
        f"{processes.world_size} x {processes.device.type}, {torch.get_num_threads()} threads, "
        f"{precision.name}; {total - start:,} steps of {o.batch_size} images "
        f"({total / loader.steps_per_epoch:.3g} epochs), {o.optimizer}, learning rate {peak:g}"
        + (f"; going on from step {start}" if start else ""))  # fmt: skip

    # loop
    sizes = datasets.evaluation_sizes(config.data, images.shape)
    knn = HeldOutKNN(data.train, data.train_labels, config.run.knn_every, (mean, std, sizes))
    last_knn = None
    with folder, Watch(processes, config.run.check_every) as watch:
        folder.begin(start, stop, method.name, o.batch_size)
        for step in train_steps(model, loader, optimizer, precision, peak=peak, total=total,
                                warmup=warmup_steps(o.warmup_epochs, loader.steps_per_epoch, total),
                                start=start, stop=stop):  # fmt: skip
            figures = {}
            if knn.due(step):
                last_knn = knn.top1(method.encoder, processes)
                figures = {"knn_top1": last_knn}
                folder.pause_clock(knn.seconds)
            folder.log(step, config.run.log_every, **figures)
            due = checkpoints.due(step) or step.index == stop - 1
            watch.look(step, method, saving=due)
            if due or watch.stop or watch.save:
                if config.run.batch_norm == "local":
                    distributed.broadcast_buffers(method)
                if main_process:
                    checkpoints.save(step.index + 1, training_state(
                        method, optimizer, precision, as_dict(config), meta))  # fmt: skip
            if watch.stop:
                break
        if not step.last:
            say(processes, f"stopped after step {step.index + 1} of {total}; go on with --resume")
            return {"stopped": watch.stop}
        result = {"name": method.name, "dataset": config.data.dataset, "steps": total,
                  "knn_top1": last_knn, "seconds": round(time.perf_counter() - started, 1),
                  "processes": processes.world_size, "device": processes.device.type,
                  "precision": precision.name}  # fmt: skip
        if main_process:
            save_encoder(out / "encoder.pt", method.encoder, meta | {"step": total})
            write_json(out / "result.json", result)
    knn_text = "" if last_knn is None else f"k-NN {last_knn:.2f} % on held-out train images; "
    say(processes, f"{out}/encoder.pt: {knn_text}{result['seconds']:.0f} s\n"
        f"next: python linear_eval.py --ckpt {out}")  # fmt: skip
    return result


def main(method_class=BYOL, argv: list[str] | None = None) -> dict:
    """Run from the command line; variants/ call it with their class."""
    return execute(
        lambda args: configure(args, method_class),
        lambda config, processes: run(config, processes, method_class),
        argv,
    )


if __name__ == "__main__":
    main()
