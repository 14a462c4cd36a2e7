"""Supervised training: one run, or one for each of STL-10's folds, each after a sweep if asked."""

import dataclasses
import itertools
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from core import options
from core.errors import NotFinite, UserError
from core.files import write_json
from core.options import as_dict, flag_of, option
from data import datasets
from data.labelled import Split, each_fold, evaluation
from data.loader import Loader
from eval.classifiers import scores
from eval.features import extract
from eval.protocols import in_words, over_folds, record
from training.config import TrainRun
from training.distributed import Processes, barrier
from training.encoder import EncoderConfig
from training.loop import peak_rate
from training.optimizers import OptimConfig
from training.run_folder import RunFolder, finished, say
from training.session import Session
from training.stopping import Watch


@dataclass(kw_only=True)
class Config(options.Config):
    """Settings of a supervised training; `with_method` adds the method's own table."""

    # a recipe's [optim] is for pretraining; [baseline] and [finetune] may set its keys
    ignored = ("optim",)

    data: datasets.LabelledData
    encoder: EncoderConfig
    optim: OptimConfig
    run: TrainRun
    sweep: bool = option(False, "choose rate and epochs on a fifth of the training labels")
    folds: bool = option(False, "stl10: each of the ten folds, mean and standard deviation")

    def kinds(self) -> list[str]:
        """Parts of the run folder's name for --sweep and --folds."""
        return [name for name in ("sweep", "folds") if getattr(self, name)]


@dataclass
class Job:
    """A kind of supervised training: the baseline or fine-tuning.

    start   function of the training images; returns a new encoder and its EvalTransform
    init    what the encoder starts from, as text
    more    further entries of result.json
    """

    method_class: type
    start: Callable
    init: str
    processes: Processes
    more: dict = field(default_factory=dict)


def train_all(config: Config, job: Job) -> dict:
    """Train one run or one per fold, each after its sweep if asked; returns the result."""
    out, run = Path(config.run.out), config.run
    if result := finished(out, config):
        say(job.processes, f"{out} is complete; nothing to do")
        return result | {"complete": True}
    ignored = [key for key in ("optim.lr", "optim.epochs", "optim.steps") if key in config.typed]
    if config.sweep and ignored:
        name = config.method_table
        text = f"not with --sweep, which tries --{name}.sweep-lr and --{name}.sweep-epochs"
        raise UserError(f"{flag_of(ignored[0])}: {text}")
    data = datasets.load(config.data)
    plan = []  # for each run: settings, split, and the split for its sweep or None
    for of_fold in each_fold(config.data, config.folds):
        split = evaluation(data, of_fold)
        of_run = dataclasses.replace(config, data=of_fold)
        plan.append((of_run, split, split.train.hold_out() if config.sweep else None))
    check_batches(config, job.processes, plan)
    if config.sweep or config.folds:
        run = open_folder(config, job.processes)
    results = []
    with Watch(job.processes, run.check_every) as watch:
        for of_run, split, part in plan:
            folder = out / f"fold{of_run.data.fold}" if config.folds else out
            of_run.run = dataclasses.replace(run, out=str(folder))
            trials = sweep(of_run, job, part, watch) if config.sweep else []
            results.append(train(of_run, job, split, watch, trials))
    if not config.folds:
        return results[0]
    result = over_folds(results)
    if job.processes.main:
        write_json(out / "result.json", result)
    say(job.processes, f"{out}: {in_words(result)}")
    return result


def check_batches(config: Config, processes: Processes, plan: list[tuple]) -> None:
    """UserError where a split, or the part that a sweep trains on, is too small for a batch."""
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


def open_folder(config: Config, processes: Processes) -> TrainRun:
    """Create the folder for several runs; returns the [run] settings of each, which resumes."""
    run = config.run
    if run.resume not in ("", "auto"):
        raise UserError(f"--resume {run.resume}: with --sweep or --folds, give --resume alone")
    if run.override:
        raise UserError("--override: not with --sweep or --folds; choose another --out")
    out, settings = Path(run.out), as_dict(config)
    if config.sweep:  # it chooses these; result.json has them
        settings["optim"] |= dict.fromkeys(("lr", "epochs", "steps"))
    with RunFolder(out, settings, processes, resume=run.resume, overwrite=run.overwrite):
        barrier()
    return dataclasses.replace(run, resume="auto", overwrite=False)


def sweep(config: Config, job: Job, part: Split, watch: Watch) -> list[dict]:
    """Try learning rates x epochs; sets the best in `config`, returns all trials.

    part   four fifths of the training labels to train on, one fifth to measure on; no test images
    """
    m, o, trials, diverged = config.method, config.optim, [], 0
    cuts = job.processes.world_size * o.accumulate
    size = min(o.batch_size, len(part.train) // cuts * cuts)
    # a smaller batch must not change the peak rate
    same = peak_rate(o.optimizer, 1, o.batch_size) / peak_rate(o.optimizer, 1, size)
    for lr, epochs in itertools.product(m.sweep_lr, m.sweep_epochs):
        folder = Path(config.run.out) / "sweep" / f"lr{lr:g}-epochs{epochs}"
        schedule = dict(epochs=epochs, steps=0, batch_size=size, lr=lr * same)
        of_trial = dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, evaluate_on="validation"),
            optim=dataclasses.replace(o, **schedule),
            run=dataclasses.replace(config.run, out=str(folder)),
        )
        try:
            top1 = train(of_trial, job, part, watch)["top1"]
        except NotFinite:
            top1, diverged = 0.0, diverged + 1
        trials.append({"lr": lr, "epochs": epochs, "held_out_top1": top1})
        if job.processes.main:  # only the trial's top-1 is needed
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            for weights in folder.glob("*.pt"):
                weights.unlink()
    if diverged == len(trials):
        rates = flag_of(f"{config.method_table}.sweep_lr")
        raise NotFinite(f"all trials of --sweep diverged; lower {rates}")
    best = max(trials, key=lambda trial: trial["held_out_top1"])
    config.optim = dataclasses.replace(o, lr=best["lr"], epochs=best["epochs"], steps=0)
    return trials


def train(config: Config, job: Job, split: Split, watch: Watch, trials: list = ()) -> dict:
    """Train encoder and head on the training images of `split`, and measure on its test images.

    trials   those of the sweep that chose the settings, if any
    Returns the content of result.json.
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
            f"{len(split.test):,} {config.data.evaluate_on} images; {session.describe(job.init)}",
        )
        for step in session.steps():
            session.log(step)
            session.save_if_due(step)
        features = extract(method.encoder, split.test.images, transform, processes)
        logits = method.head.cpu()(features)
        result = result_of(config, job, split, session, logits, trials)
        session.finish(result, lambda: classifier_of(session, classes))
    say(
        processes,
        f"{out}: {in_words(result)} on {len(split.test):,} {config.data.evaluate_on} images with "
        f"{len(split.train):,} labels, {result['seconds']:.0f} s\n"
        f"next: tensorboard --logdir {shlex.quote(str(out))}",
    )
    return result


def classifier_of(session: Session, classes: list[str]) -> dict:
    """The content of classifier.pt."""
    network = {name: getattr(session.method, name).state_dict() for name in ("encoder", "head")}
    return network | {"meta": session.meta, "classes": classes}


def result_of(config, job: Job, split: Split, session: Session, logits, trials: list) -> dict:
    """The content of result.json."""
    o = config.optim
    more = {"init": config.encoder.init, "optimizer": o.optimizer, "lr": o.lr}
    more |= {"steps": session.total, **job.more, "seconds": round(session.seconds, 1)}
    more |= {"trials": trials} if trials else {}
    more |= scores(logits, split.test.labels)
    protocol = "network-sweep" if trials else "network"
    return record(protocol, session.method.name, config, split, **more)
