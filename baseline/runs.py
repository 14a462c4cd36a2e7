"""Labelled training as it is asked for: one run, STL-10's ten folds, a sweep before each."""

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from data import datasets
from eval.protocols import over_folds
from training.config import UserError, as_dict
from training.distributed import Processes, barrier
from training.run_folder import RunFolder, finished, say, write_json
from training.schedules import peak_rate
from training.stopping import Watch

SWEEP = (
    ("--sweep",),
    dict(action="store_true", help="choose rate and epochs on a fifth of the training labels"),
)
EXTRA = (SWEEP, datasets.FOLDS)


@dataclass
class Job:
    """What the baseline and fine-tuning differ in.

    start   function of the training images: a new encoder, mean and std of its inputs
    more    what else result.json says
    """

    method_class: type
    start: Callable
    processes: Processes
    more: dict = field(default_factory=dict)


def train_all(config, job: Job, train: Callable) -> dict:
    """The one run that is asked for; with --folds ten of them, with --sweep a grid before each.

    train   function of settings, job, split, watch and trials: one training, see train_baseline.py
    """
    out, run = Path(config.run.out), config.run
    if result := finished(out, config):
        say(job.processes, f"{out} is complete; nothing to do")
        return result | {"complete": True}
    data = datasets.load(config.data)
    every = []
    for own in datasets.each_fold(config.data, config.folds):
        split = data.evaluation(own)
        every.append((own, split, split.train.hold_out() if config.sweep else None))
    fewest, batch = min(len(split.train) for _, split, _ in every), config.optim.batch_size
    if batch > fewest:
        raise UserError(f"--batch-size {batch}: there are only {fewest} training images")
    needed = 2 * job.processes.world_size * config.optim.accumulate
    few = min((len(part.train) for *_, part in every if part), default=needed)
    if few < needed:
        raise UserError(
            f"--sweep: without the held-out fifth {few} images are left; {needed} are needed, two "
            "for each process and micro-batch"
        )
    if config.sweep or config.folds:  # many runs in one folder, each of which can go on
        if run.resume not in ("", "auto"):
            raise UserError(f"--resume {run.resume}: with --sweep or --folds, --resume alone")
        if run.override:
            raise UserError("--override: not with --sweep or --folds; choose another --out")
        settings = as_dict(config)
        with RunFolder(out, settings, job.processes, resume=run.resume, overwrite=run.overwrite):
            barrier()
        run = dataclasses.replace(run, resume="auto", overwrite=False)
    results = []
    with Watch(job.processes, run.check_every) as watch:
        for own, split, part in every:
            folder, trials = (out / f"fold{own.fold}" if config.folds else out), []
            now = with_(config, data=own, run=dataclasses.replace(run, out=str(folder)))
            if config.sweep:
                now, trials = sweep(now, job, part, watch, train)
            result = train(now, job, split, watch, trials) if now else trials[-1]
            if "stopped" in result:
                return result
            results.append(result)
    if not config.folds:
        return results[0]
    result = over_folds(results)
    if job.processes.main:
        write_json(out / "result.json", result)
    text = f"{out}: top-1 {result['top1']:.2f} % ± {result['top1_std']:.2f} over 10 folds"
    say(job.processes, text)
    return result


def with_(config, **sections) -> SimpleNamespace:
    """The same settings with other sections."""
    return SimpleNamespace(**vars(config) | sections)


def sweep(config, job: Job, part: datasets.Split, watch: Watch, train: Callable):
    """Rate x epochs on `part` of the training labels: (settings with the best, the trials).

    It gets no test images.  Where the run is stopped: (None, [the stopped trial]).
    """
    m, o, trials = config.method, config.optim, []
    cuts = job.processes.world_size * o.accumulate
    size = min(o.batch_size, len(part.train) // cuts * cuts)
    same = peak_rate(o.optimizer, 1, o.batch_size) / peak_rate(o.optimizer, 1, size)
    for lr, epochs in itertools.product(m.sweep_lr, m.sweep_epochs):
        folder = Path(config.run.out) / "sweep" / f"lr{lr:g}-epochs{epochs}"
        schedule = dict(epochs=epochs, steps=0, batch_size=size, lr=lr * same)
        own = with_(
            config,
            data=dataclasses.replace(config.data, evaluate_on="validation"),
            optim=dataclasses.replace(o, **schedule),
            run=dataclasses.replace(config.run, out=str(folder)),
        )
        result = train(own, job, part, watch)
        if "stopped" in result:
            return None, [result]
        trials.append({"lr": lr, "epochs": epochs, "held_out_top1": result["top1"]})
        if job.processes.main:  # only its figure is of use
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            for weights in folder.glob("*.pt"):
                weights.unlink()
    best = max(trials, key=lambda trial: trial["held_out_top1"])
    chosen = dict(lr=best["lr"], epochs=best["epochs"], steps=0)
    return with_(config, optim=dataclasses.replace(o, **chosen)), trials
