"""Measure the results table of a recipe: controls, baseline, pretraining, evaluations.

    python reproduce.py --recipe recipes/sample.toml --out runs/sample
    python reproduce.py --recipe recipes/sample.toml --methods byol simsiam dino --steps 1800

Several methods get the recipe's data, steps, batch size and views (DINO has its own views); a
method's table in the recipe may set its learning rate and other options.  Their table has accuracy
on frozen features, its standard deviation over seeds, and images per second.

Flags of [optim], such as --steps, are for pretraining alone.  After an interruption, the same
command skips what is done.

To choose settings, add `--evaluate-on validation --reproduce.first-draw 1000`: this measures on
labelled train images outside the label draw, and takes draws that are in no published table.
"""

import contextlib
import dataclasses
import importlib
import itertools
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import finetune
import train_baseline
import train_byol
from baseline.baseline import Baseline, Finetune
from core import options
from core.errors import UserError
from core.files import lock_folder, read_json, write_json
from core.options import make_config, option, options_of, parse, with_method
from data import datasets
from data.images import Images
from data.labelled import Split, evaluation
from data.transform import frame
from eval import supervised
from eval.classifiers import LinearConfig, MLPConfig, fit
from eval.knn import knn_top1
from eval.protocols import of_head
from eval.table import CONTROLS, Cells, Key, markdown, method_rows, methods_markdown
from eval.trained import Features, FrozenEncoder, load
from training.command import execute
from training.config import TableRun
from training.distributed import Processes, barrier
from training.encoder import EncoderConfig, NewEncoderConfig, fetch
from training.method import Method
from training.optimizers import OptimConfig
from training.run_folder import git_commit, read_metrics, say

SHARED = ("recipe", "data", "encoder", "run")  # flags of these tables apply to all runs


@dataclass
class ReproduceConfig:
    """[reproduce]: label budgets, draws and seeds of the table."""

    title: str = option("Results", "heading of the table")
    budgets: list[int] = option([100, 500], "label budgets", low=1)
    draws: int = option(5, "label draws for rows on frozen features", low=1)
    trained_draws: int = option(3, "label draws for baseline and fine-tuning", low=1)
    first_draw: int = option(0, "number of the first draw", low=0)
    seeds: int = option(1, "pretraining seeds", low=1)
    inits: list[str] = option(["random"], "initial weights", choices=("random", "imagenet"))


@dataclass(kw_only=True)
class Config(options.Config):
    """Settings of a whole table."""

    data: datasets.TableData
    encoder: NewEncoderConfig
    optim: OptimConfig
    run: TableRun
    linear: LinearConfig
    mlp: MLPConfig
    reproduce: ReproduceConfig
    methods: list[str] = option(["byol"], "byol, or files of variants/")


def method_of(name: str) -> type[Method]:
    """The class in variants/NAME.py, or BYOL; NAME:CLASS where the file has several."""
    file, _, wanted = name.partition(":")
    if name == "byol":
        return train_byol.BYOL
    if not (file.isidentifier() and (Path(__file__).parent / "variants" / f"{file}.py").exists()):
        raise UserError(f"--methods {name}: no file variants/{file}.py; try byol, simsiam, dino")
    module = importlib.import_module(f"variants.{file}")
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Method)]
    classes = [c for c in classes if c.__module__ == module.__name__]  # defined there, not imported
    chosen = [c for c in classes if wanted in ("", c.__name__)]
    if len(chosen) != 1:
        names = ", ".join(f"{file}:{c.__name__}" for c in classes) or "no method"
        raise UserError(f"--methods {name}: that file has {names}; name one")
    return chosen[0]


def configure(argv: list[str]) -> Config:
    """The settings from the command line; UserError for a mistake in those of any of the runs."""
    config = make_config(Config, parse(Config, argv, __doc__))
    if not config.recipe:
        raise UserError("--recipe is missing: name one of recipes/*.toml")
    if stop := config.recipe_tables.get("run", {}).get("stop_after"):
        raise UserError(f"[run] stop_after = {stop}: a table needs whole runs")
    several = len(config.methods) > 1
    config.run.out = config.run.out or f"runs/{'methods' if several else Path(config.recipe).stem}"
    if several:
        config.reproduce.inits = ["random"]
    names = [method_of(name).name for name in config.methods]
    if len(set(names)) < len(names):
        raise UserError("--methods: two of them have the same `name`, or one is named twice")
    pretraining_settings(config)
    check_budgets(config)
    return config


def pretraining_settings(config: Config) -> list[train_byol.Config]:
    """The pretraining settings of each method; UserError where its table has a mistake."""
    typed = {k: v for k, v in config.typed.items() if k == "recipe" or k.startswith("optim.")}
    return [train_byol.settings(typed, method_of(name)) for name in config.methods]


def supervised_settings(config: Config) -> list[supervised.Config]:
    """The settings of baseline and fine-tuning, which a table of several methods doesn't have."""
    methods = (Baseline, Finetune) if len(config.methods) == 1 else ()
    typed = {"recipe": config.recipe}
    return [make_config(with_method(supervised.Config, method), typed) for method in methods]


def check_budgets(config: Config) -> None:
    """UserError where a budget is smaller than the batch size of baseline or fine-tuning."""
    budget = min(config.reproduce.budgets)
    for settings in supervised_settings(config):
        if settings.optim.batch_size > budget:
            text = f"batches of [{settings.method_table}] have {settings.optim.batch_size} images"
            raise UserError(f"--reproduce.budgets {budget}: {text}; lower its batch_size")


class Table:
    """What all rows share: settings, data and, once it is `opened`, the cells measured so far."""

    def __init__(self, config: Config, processes: Processes) -> None:
        self.config, self.processes, self.out = config, processes, Path(config.run.out)
        self.data = datasets.load(config.data)
        self.check()

    @contextlib.contextmanager
    def opened(self):
        """Context with the cells measured so far, which locks the folder."""
        with contextlib.ExitStack() as stack:
            if self.processes.main:
                self.out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_folder(self.out))
                keep_settings(self.out / "settings.json", self.config, self.data.digest())
            barrier()
            self.cells = Cells(self.out / "cells.jsonl", self.processes.main)
            barrier()  # all have read before the main process adds a cell
            yield

    def check(self) -> None:
        """UserError for a data set or batch that is too small, before anything is measured."""
        for budget in self.config.reproduce.budgets:
            try:
                self.split(budget, self.config.reproduce.first_draw)
            except UserError as error:  # its text has the scripts' flag
                raise UserError(str(error).replace("--labels", "--reproduce.budgets")) from None
        images, _ = self.data.pretraining(self.config.data.pretrain_on)
        pretraining = pretraining_settings(self.config)
        batch = max(s.optim.batch_size for s in pretraining)
        if batch > len(images):
            raise UserError(f"batch_size {batch}: there are only {len(images)} training images")
        for s in (*pretraining, *supervised_settings(self.config)):
            parts, batch = self.processes.world_size * s.optim.accumulate, s.optim.batch_size
            if batch % parts or batch < 2 * parts:
                text = f"can't be cut into {parts} equal parts of at least 2 images"
                raise UserError(f"recipe: [{s.method_table}] batch_size {batch}: {text}; change it")
        starting_point(self, "random", 0)  # checks the sizes

    def split(self, labels: int, draw: int) -> Split:
        """The labelled images of one draw, and the images to measure on."""
        on = self.config.data.evaluate_on
        chosen = datasets.LabelledData(labels=labels, draw=draw, evaluate_on=on)
        return evaluation(self.data, chosen)

    def missing(self, name: str, init: str, seed: int, draws: int) -> list[Key]:
        """Keys of one row's cells that are not measured yet: `draws` label draws at each budget."""
        r, keys = self.config.reproduce, []
        for budget in r.budgets:
            count = 1 if budget == len(self.data.train) else draws  # all labels: one draw
            for draw in range(r.first_draw, r.first_draw + count):
                keys.append(Key(name, init, budget, draw, seed))
        return [key for key in keys if key not in self.cells]

    def add(self, key: Key, top1: float, seconds: float, protocol: str, images: int) -> None:
        """Store and print one measured cell."""
        values = dict(top1=round(top1, 4), seconds=round(seconds, 3), protocol=protocol)
        self.cells.add(key, **values, test_images=images)
        say(
            self.processes,
            f"{key.name:>20} ({key.init}) {key.labels:>6,} labels, draw {key.draw}, "
            f"seed {key.seed}: {top1:6.2f} %  {seconds:.1f} s",
        )

    def typed(self, folder: str, more: dict, tables: tuple = SHARED) -> dict:
        """Flags of a run: those typed for `tables`, the run's folder, and `more`."""
        typed = {k: v for k, v in self.config.typed.items() if k.split(".")[0] in tables}
        return typed | {"run.out": str(self.out / folder), "run.resume": "auto"} | more


def keep_settings(path: Path, config: Config, digest: list) -> None:
    """Write the settings that shape the cells; UserError if --out has cells of others.

    digest   of the data set; older tables lack it
    """
    settings = shaping({"recipe": config.recipe_tables, "flags": config.typed})
    old = read_json(path) if path.exists() else settings
    if shaping(old) != settings or old.get("data", digest) != digest:
        what = "another recipe or other flags" if shaping(old) != settings else "other images"
        raise UserError(f"--out {path.parent} holds a table of {what}; choose another --out")
    write_json(path, settings | {"data": digest})


def shaping(settings: dict) -> dict:
    """The part of {"recipe": tables, "flags": typed values} that changes the result of a cell."""
    others = ("", "reproduce")  # these only select the cells to measure
    recipe = {name: dict(t) for name, t in settings["recipe"].items() if name not in others}
    flags = {k: v for k, v in settings["flags"].items() if k.rpartition(".")[0] not in others}
    for table, kind in {"data": datasets.DataConfig, "run": TableRun}.items():
        for name, (field, _) in options_of(kind).items():
            if not field.metadata["trajectory"]:  # such as data_root
                recipe.get(table, {}).pop(name, None)
                flags.pop(f"{table}.{name}", None)
    recipe = {name: table for name, table in recipe.items() if table}
    return {"recipe": recipe, "flags": flags}


def pixels(images: Images, side: int = 32) -> Tensor:
    """Raw pixels as features (N, 3 * h * w): values in 0..1, images at most `side` pixels high.

    Gray images: (N, h * w).
    """
    height, blocks = min(side, images.shape[0]), torch.arange(len(images)).split(1024)
    x = torch.cat([frame(images.take(rows.numpy()), height, 0) for rows in blocks])
    return (x[:, :1] if images.gray else x).flatten(1)


def frozen_rows(table: Table, rows: dict[str, str], init: str, seed: int, build=None) -> None:
    """Measure rows on frozen features: {row name: linear | mlp | knn}, over budgets and draws.

    build   function that returns the encoder and its EvalTransform; None for raw pixels
    """
    c, cells = table.config, []
    for name, head in rows.items():
        cells += [(key, head) for key in table.missing(name, init, seed, c.reproduce.draws)]
    if not cells:
        return
    extract = FrozenEncoder(*build(), table.processes) if build else pixels
    features, classes = Features(extract, table.data), len(table.data.class_names)
    for key, head in cells:
        split = table.split(key.labels, key.draw)
        x, y = features(split.train), features(split.test)
        started, truth = time.perf_counter(), torch.from_numpy(split.test.labels)
        if head == "knn":
            top1 = knn_top1(x, torch.from_numpy(split.train.labels), y, truth)
        else:
            top1 = fit(head, x, split.train.labels, classes, c.linear, c.mlp, seed).top1(y, truth)
        protocol = of_head(head, c.linear.strength, "features" if build else "pixels")
        table.add(key, top1, time.perf_counter() - started, protocol, len(truth))


def control_rows(table: Table, inits: list[str]) -> None:
    """Measure raw pixels, random encoders of the same shape, and features of ImageNet weights."""
    frozen_rows(table, {"raw-pixels": "linear"}, "none", 0)
    for seed in range(table.config.reproduce.seeds):
        build = partial(starting_point, table, "random", seed)
        frozen_rows(table, {"random-encoder": "linear"}, "none", seed, build)
    if "imagenet" in inits:
        build = partial(starting_point, table, "imagenet", 0)
        frozen_rows(table, {"imagenet-features": "linear"}, "imagenet", 0, build)


def starting_point(table: Table, init: str, seed: int):
    """The encoder and its EvalTransform that pretraining starts from.

    The batch norms of a random ResNet keep running means 0 and variances 1: with the statistics of
    real images the control is much weaker (31 % instead of 55 % on the sample).  Other networks
    need those, see `measure_statistics`.
    """
    data = table.config.data
    images, _ = table.data.pretraining(data.pretrain_on)
    encoder = EncoderConfig(**vars(table.config.encoder), init=init)
    return train_byol.start(encoder, data, images, seed)


def trained_rows(table: Table, name: str, init: str, seed: int, script, more: dict) -> None:
    """Measure a row of supervised trainings: one run of `script`, in its own folder, per cell."""
    quiet = dataclasses.replace(table.processes, quiet=True)
    for key in table.missing(name, init, seed, table.config.reproduce.trained_draws):
        folder = f"{name}-{init}/seed{seed}-labels{key.labels}-draw{key.draw}"
        of_cell = {"data.labels": key.labels, "data.draw": key.draw, "run.seed": key.draw}
        started = time.perf_counter()
        typed = table.typed(folder, {"run.save_every": 0, **of_cell, **more})
        result = script.run(script.settings(typed), quiet)
        seconds = time.perf_counter() - started
        table.add(key, result["top1"], seconds, result["protocol"], result["test_images"])


def pretrain(table: Table, method: type[Method], init: str, seed: int) -> Path:
    """Pretrain unless that is done; returns the run folder, inside the table's folder."""
    folder = f"{method.name}-{init}-seed{seed}"
    typed = table.typed(folder, {"encoder.init": init, "run.seed": seed}, (*SHARED, "optim"))
    train_byol.run(train_byol.settings(typed, method), table.processes, method)
    return table.out / folder


def prepare(config: Config) -> None:
    """Download data and published weights; what is missing is an error before the first row."""
    for init in config.reproduce.inits:
        fetch(EncoderConfig(**vars(config.encoder), init=init))
    datasets.prepare(config.data)


def run(config: Config, processes: Processes) -> dict:
    """Measure all rows and write the table into --out; returns the content of its JSON files."""
    table = Table(config, processes)
    with table.opened():
        return measure(table)


def measure(table: Table) -> dict:
    """Measure the rows that are missing and write the results."""
    config, r = table.config, table.config.reproduce
    methods = [method_of(name) for name in config.methods]
    alone = len(methods) == 1
    heads = ("knn", "linear", "mlp") if alone else ("linear", "knn")
    control_rows(table, r.inits)
    folders = {method.name: [] for method in methods}
    for method, init in itertools.product(methods, r.inits):
        m = method.name
        if alone:
            trained_rows(table, "baseline", init, 0, train_baseline, {"encoder.init": init})
        for seed in range(r.seeds):
            folder = pretrain(table, method, init, seed)
            rows = {f"{m}-{head}": head for head in heads}
            frozen_rows(table, rows, init, seed, partial(load, folder))
            if alone:
                trained_rows(table, f"{m}-finetune", init, seed, finetune, {"ckpt": str(folder)})
            folders[m].append(folder)
    return write_results(table, folders) if alone else write_methods(table, folders)


def write_methods(table: Table, folders: dict[str, list[Path]]) -> dict:
    """Write methods.json, methods.md, methods.png, curves.png (first seeds); print the table.

    folders   method's name -> folders of its pretraining runs, one for each seed
    """
    rows, curves, budgets, out = [], {}, table.config.reproduce.budgets, table.out
    for name, runs in folders.items():
        logged = [read_metrics(run / "metrics.jsonl") for run in runs]
        curves[name] = logged[0]
        later = [row for metrics in logged for row in metrics[1:]]  # the first step is slower
        rates = [row["images_per_second"] for row in later]
        rate = float(np.median(rates)) if rates else None
        rows += method_rows(table.cells, name, budgets, rate)
    for control in CONTROLS:
        rows += method_rows(table.cells, control, budgets, None)
    if table.processes.main:
        from eval.pictures import curves_figure, dots_figure, save  # slow to import

        text = methods_markdown(rows)
        write_json(out / "methods.json", rows)
        (out / "methods.md").write_text(text, encoding="utf-8")
        save(out / "methods.png", dots_figure, rows)
        save(out / "curves.png", curves_figure, curves)
        say(table.processes, f"\n{text}\n{out}/methods.md, .json and .png, curves.png written")
    return {"rows": rows}


def write_results(table: Table, folders: dict[str, list[Path]]) -> dict:
    """Write results.json, claims.json, results.md, results.png, curves.png; print the table.

    folders   name of the one method -> folders of its pretraining runs
    """
    ((method, runs),) = folders.items()
    rows, claims = table.cells.rows(), table.cells.claims(method)
    if table.processes.main:
        from eval.pictures import accuracy_figure, curves_figure, save  # slow to import

        title, out = table.config.reproduce.title, table.out
        text = markdown(rows, claims, title, notes(table, rows, runs))
        write_json(out / "results.json", rows)
        write_json(out / "claims.json", claims)
        (out / "results.md").write_text(text, encoding="utf-8")
        save(out / "results.png", accuracy_figure, rows, title)
        curves = {run.name: read_metrics(run / "metrics.jsonl") for run in runs}
        save(out / "curves.png", curves_figure, curves)
        say(table.processes, f"\n{text}\n{out}/results.md, .json and .png, curves.png written")
    return {"rows": rows, "claims": claims}


def notes(table: Table, rows: list[dict], runs: list[Path]) -> list[str]:
    """Paragraphs of results.md: images, cost and machine, command and commit."""
    data, p = table.config.data, table.processes
    seconds = np.mean([read_json(run / "result.json")["seconds"] for run in runs])
    threads = read_json(runs[0] / "config.json")["threads"]
    counts = ", ".join(f"{n:,}" for n in dict.fromkeys(row["test_images"] for row in rows))
    lines = [
        f"{data.dataset}: measured on {counts} {data.evaluate_on} images. "
        f"Pretraining took {seconds:.0f} s per seed on {p.world_size} x {p.device.type} "
        f"({processor(p.device)}), {threads} threads; "
        "`seconds` is the time of one cell, without pretraining and feature extraction.",
        "",
        f"`python reproduce.py {shlex.join(sys.argv[1:])}`, commit {git_commit()}.",
    ]
    if "imagenet" in table.config.reproduce.inits and data.dataset == "stl10":
        lines += ["", "STL-10's images come from ImageNet, whose weights have seen these classes."]
    return lines


def processor(device: torch.device) -> str:
    """The GPU's name, or the CPU's as far as the system tells it."""
    name = getattr(torch.get_device_module(device), "get_device_name", None)  # cuda, xpu
    if name:
        return name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, prepare, argv)


if __name__ == "__main__":
    main()
