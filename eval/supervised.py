"""Supervised runs: one, one for each of STL-10's folds, or one for each point of a sweep."""

import dataclasses
import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from core.errors import UserError
from core.files import write_json
from core.options import RunConfig, as_dict
from data import datasets
from data.labelled import FOLDS, Split, each_fold, evaluation
from eval.protocols import over_folds
from training.distributed import Processes, barrier
from training.loop import peak_rate
from training.run_folder import RunFolder, finished, say
from training.stopping import Watch

SWEEP = (
    ("--sweep",),
    dict(action="store_true", help="choose rate and epochs on a fifth of the training labels"),
)
EXTRA = (SWEEP, FOLDS)


@dataclass
class Job:
    """What the baseline and fine-tuning differ in.

    start   function of the training images: a new encoder and its EvalTransform
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
    out = Path(config.run.out)
    if result := finished(out, config):
        say(job.processes, f"{out} is complete; nothing to do")
        return result | {"complete": True}
    data = datasets.load(config.data)
    plan = []  # settings of the data, its split, and the part of that for a sweep
    for of_fold in each_fold(config.data, config.folds):
        split = evaluation(data, of_fold)
        plan.append((of_fold, split, split.train.hold_out() if config.sweep else None))
    check_batches(config, job.processes, plan)
    run = config.run
    if config.sweep or config.folds:
        run = open_folder(config, job.processes)
    results = []
    with Watch(job.processes, run.check_every) as watch:
        for of_fold, split, part in plan:
            folder, trials = (out / f"fold{of_fold.fold}" if config.folds else out), []
            now = with_(config, data=of_fold, run=dataclasses.replace(run, out=str(folder)))
            if config.sweep:
                now, trials = sweep(now, job, part, watch, train)
            results.append(train(now, job, split, watch, trials))
    if not config.folds:
        return results[0]
    result = over_folds(results)
    if job.processes.main:
        write_json(out / "result.json", result)
    text = f"{out}: top-1 {result['top1']:.2f} % ± {result['top1_std']:.2f} over 10 folds"
    say(job.processes, text)
    return result


def check_batches(config, processes: Processes, plan: list[tuple]) -> None:
    """UserError where a split, or what a sweep leaves of it, is too small for a batch."""
    fewest, batch = min(len(split.train) for _, split, _ in plan), config.optim.batch_size
    if batch > fewest:
        raise UserError(f"--batch-size {batch}: there are only {fewest} training images")
    needed = 2 * processes.world_size * config.optim.accumulate
    few = min((len(part.train) for *_, part in plan if part), default=needed)
    if few < needed:
        raise UserError(
            f"--sweep: without the held-out fifth {few} images are left; {needed} are needed, two "
            "for each process and micro-batch"
        )


def open_folder(config, processes: Processes) -> RunConfig:
    """Make the folder of many runs, each of which can go on; returns the settings of those."""
    run = config.run
    if run.resume not in ("", "auto"):
        raise UserError(f"--resume {run.resume}: with --sweep or --folds, --resume alone")
    if run.override:
        raise UserError("--override: not with --sweep or --folds; choose another --out")
    out, settings = Path(run.out), as_dict(config)
    with RunFolder(out, settings, processes, resume=run.resume, overwrite=run.overwrite):
        barrier()
    return dataclasses.replace(run, resume="auto", overwrite=False)


def with_(config, **sections) -> SimpleNamespace:
    """The same settings with other sections."""
    return SimpleNamespace(**vars(config) | sections)


def sweep(config, job: Job, part: Split, watch: Watch, train: Callable):
    """Rate x epochs on `part` of the training labels: (settings with the best, the trials).

    It gets no test images.
    """
    m, o, trials = config.method, config.optim, []
    cuts = job.processes.world_size * o.accumulate
    size = min(o.batch_size, len(part.train) // cuts * cuts)
    same = peak_rate(o.optimizer, 1, o.batch_size) / peak_rate(o.optimizer, 1, size)
    for lr, epochs in itertools.product(m.sweep_lr, m.sweep_epochs):
        folder = Path(config.run.out) / "sweep" / f"lr{lr:g}-epochs{epochs}"
        schedule = dict(epochs=epochs, steps=0, batch_size=size, lr=lr * same)
        of_trial = with_(
            config,
            data=dataclasses.replace(config.data, evaluate_on="validation"),
            optim=dataclasses.replace(o, **schedule),
            run=dataclasses.replace(config.run, out=str(folder)),
        )
        result = train(of_trial, job, part, watch)
        trials.append({"lr": lr, "epochs": epochs, "held_out_top1": result["top1"]})
        if job.processes.main:  # only its top-1 is of use
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            for weights in folder.glob("*.pt"):
                weights.unlink()
    best = max(trials, key=lambda trial: trial["held_out_top1"])
    chosen = dict(lr=best["lr"], epochs=best["epochs"], steps=0)
    return with_(config, optim=dataclasses.replace(o, **chosen)), trials
