"""Every row of the results table for one recipe: controls, baseline, pretraining, evaluations.

    python reproduce.py --recipe recipes/sample.toml --out runs/sample
    python reproduce.py --recipe recipes/sample.toml --methods byol simsiam dino --steps 1800

Several methods share one budget: data, steps, batch and views are the recipe's (but for DINO's
views); a method's table in the recipe may set its rate and the like.  Their table has accuracy on
frozen features, its spread over seeds, and speed.  Flags of [optim], such as --steps, are
pretraining's.

Interrupt it at any time: what is done is skipped when it is started again.  To choose settings, add
`--evaluate-on validation --reproduce.first-draw 1000`: labelled images outside draws that no
table reports take the place of the test images.
"""

import dataclasses
import importlib
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import finetune
import train_baseline
import train_byol
from baseline.baseline import Baseline, Finetune
from core import options
from core.errors import UserError
from core.files import read_json, write_json
from core.options import make_config, option, parse, with_method
from data import datasets
from data.labelled import evaluation
from data.transform import eval_sizes
from eval import supervised
from eval.classifiers import LinearConfig, MLPConfig, fit
from eval.frozen import Features, FrozenEncoder, pixels
from eval.knn import knn_top1
from eval.protocols import of_head
from eval.table import CONTROLS, Cells, markdown, method_rows, methods_markdown
from eval.trained import load
from training import distributed
from training.command import execute
from training.config import TableRun
from training.encoder import EncoderConfig, NewEncoderConfig, fetch
from training.method import Method
from training.optimizers import OptimConfig
from training.run_folder import git_commit, read_metrics, say

SHARED = ("recipe", "data", "encoder", "run")  # what is typed for these holds for all runs


@dataclass
class ReproduceConfig:
    """[reproduce]: which rows, how often."""

    title: str = option("Results", "heading of the table")
    budgets: list[int] = option([100, 500], "label budgets", low=1)
    draws: int = option(5, "label draws for rows on frozen features", low=1)
    trained_draws: int = option(3, "label draws for baseline and fine-tuning", low=1)
    first_draw: int = option(0, "number of the first draw", low=0)
    seeds: int = option(1, "pretraining seeds", low=1)
    inits: list[str] = option(["random"], "starting points", choices=("random", "imagenet"))


@dataclass(kw_only=True)
class Config(options.Config):
    """The settings of a whole table."""

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
        raise UserError(f"--methods {name}: no file variants/{file}.py; byol, simsiam, dino, ...?")
    module = importlib.import_module(f"variants.{file}")
    local = [c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__]
    classes = {c.__name__: c for c in local if isinstance(c, type) and issubclass(c, Method)}
    chosen = [c for title, c in classes.items() if wanted in ("", title)]
    if len(chosen) != 1:
        names = ", ".join(f"{file}:{title}" for title in classes) or "no method"
        raise UserError(f"--methods {name}: that file has {names}; name one")
    return chosen[0]


def configure(argv: list[str]) -> Config:
    """The settings of the whole table; a mistake in any table that it needs shows up here."""
    config = make_config(Config, parse(Config, argv, __doc__))
    if not config.recipe:
        raise UserError("--recipe is missing: name one of recipes/*.toml")
    if stop := config.recipe_tables.get("run", {}).get("stop_after"):
        raise UserError(f"[run] stop_after = {stop}: a table needs whole runs")
    several = len(config.methods) > 1
    config.run.out = config.run.out or f"runs/{'methods' if several else Path(config.recipe).stem}"
    names = [method_of(name).name for name in config.methods]
    if len(set(names)) < len(names):
        raise UserError("--methods: two of them have the same `name`, or one stands there twice")
    pretraining_settings(config)
    if not several:
        check_budgets(config)
    return config


def pretraining_settings(config: Config) -> list[train_byol.Config]:
    """Those of each method; a UserError where its table in the recipe is wrong."""
    typed = {k: v for k, v in config.typed.items() if k == "recipe" or k.startswith("optim.")}
    return [train_byol.settings(typed, method_of(name)) for name in config.methods]


def check_budgets(config: Config) -> None:
    """UserError where a budget is smaller than a batch of the baseline or of fine-tuning."""
    budget = min(config.reproduce.budgets)
    for method in (Baseline, Finetune):
        settings = make_config(with_method(supervised.Config, method), {"recipe": config.recipe})
        if settings.optim.batch_size > budget:
            text = f"batches of [{method.name}] have {settings.optim.batch_size} images"
            raise UserError(f"--reproduce.budgets {budget}: {text}; lower its batch_size")


class Table:
    """What all rows share: data, settings, finished cells, and how a script's run is called."""

    def __init__(self, config, processes) -> None:
        self.config, self.processes = config, processes
        self.quiet = dataclasses.replace(processes, quiet=True)
        self.out = Path(config.run.out)
        self.data = datasets.load(config.data)
        for budget in config.reproduce.budgets:  # refuses those that the data set can't give
            try:
                self.split(budget, config.reproduce.first_draw)
            except UserError as error:  # it names the scripts' flag
                raise UserError(str(error).replace("--labels", "--reproduce.budgets")) from None
        images, _ = self.data.pretraining(config.data.pretrain_on)
        batch = max(settings.optim.batch_size for settings in pretraining_settings(config))
        if batch > len(images):
            raise UserError(f"batch_size {batch}: there are only {len(images)} training images")
        eval_sizes(config.data, images.shape)  # refuses wrong ones
        if processes.main:
            self.out.mkdir(parents=True, exist_ok=True)
            same_settings(self.out / "settings.json", config)
            self.cells = Cells(self.out / "cells.jsonl", True)
        distributed.barrier()
        if not processes.main:
            self.cells = Cells(self.out / "cells.jsonl", False)
        distributed.barrier()
        r = config.reproduce
        self.draws = range(r.first_draw, r.first_draw + r.draws)
        self.trained = range(r.first_draw, r.first_draw + r.trained_draws)

    def typed(self, folder: str, more: dict) -> dict:
        """What a run inside this table gets: what was typed for the table, its folder, and more."""
        shared = {k: v for k, v in self.config.typed.items() if k.split(".")[0] in SHARED}
        return shared | {"run.out": str(self.out / folder), "run.resume": "auto"} | more

    def split(self, labels: int, draw: int):
        """The labelled images of one draw and what is measured on."""
        on = self.config.data.evaluate_on
        settings = datasets.LabelledData(labels=labels, draw=draw, evaluate_on=on)
        return evaluation(self.data, settings)

    def missing(self, name: str, init: str, seed: int, draws) -> list[tuple]:
        """Keys of the cells of one row that are not there yet."""
        everything = len(self.data.train)  # one draw is all there is of it
        keys = [
            (name, init, b, d, seed)
            for b in self.config.reproduce.budgets
            for d in (draws[:1] if b == everything else draws)
        ]
        return [key for key in keys if key not in self.cells]

    def add(self, key: tuple, top1: float, seconds: float, protocol: str, images: int) -> None:
        """Keep one cell and print it."""
        figures = dict(top1=round(top1, 4), seconds=round(seconds, 3), protocol=protocol)
        self.cells.add(key, **figures, test_images=images)
        name, init, labels, draw, seed = key
        say(
            self.processes,
            f"{name:>20} ({init}) {labels:>6,} labels, draw {draw}, seed {seed}: "
            f"{top1:6.2f} %  {seconds:.1f} s",
        )


def same_settings(path: Path, config: Config) -> None:
    """UserError where --out holds cells of other settings; what only adds cells may change."""
    more = ("run", "reproduce")
    recipe = {name: table for name, table in config.recipe_tables.items() if name not in more}
    flags = {k: v for k, v in config.typed.items() if "." in k and k.split(".")[0] not in more}
    settings = {"recipe": recipe, "flags": flags}
    if path.exists() and read_json(path) != settings:
        raise UserError(
            f"--out {path.parent} holds a table of another recipe or other flags; "
            "choose another --out"
        )
    write_json(path, settings)


def frozen_rows(table: Table, rows: dict[str, str], init: str, seed: int, build=None) -> None:
    """Rows on frozen features: {row name: linear | mlp | knn}, over all budgets and draws.

    build   function that gives the encoder and its EvalTransform; raw pixels without one
    """
    cells = [(k, h) for n, h in rows.items() for k in table.missing(n, init, seed, table.draws)]
    if not cells:
        return
    extract = FrozenEncoder(*build(), table.processes) if build else pixels
    c, classes, features = table.config, len(table.data.class_names), Features(extract, table.data)
    for key, how in cells:
        split = table.split(key[2], key[3])
        x, y = features(split.train), features(split.test)
        begun, truth = time.perf_counter(), torch.from_numpy(split.test.labels)
        if how == "knn":
            top1 = knn_top1(x, torch.from_numpy(split.train.labels), y, truth)
        else:
            top1 = fit(how, x, split.train.labels, classes, c.linear, c.mlp, seed).top1(y, truth)
        protocol = of_head(how, c.linear.strength, "features" if build else "pixels")
        table.add(key, top1, time.perf_counter() - begun, protocol, len(truth))


def control_rows(table: Table, inits: list[str]) -> None:
    """Raw pixels, random encoders of the same shape, and untouched ImageNet features."""
    frozen_rows(table, {"raw-pixels": "linear"}, "none", 0)
    for seed in range(table.config.reproduce.seeds):
        build = partial(starting_point, table, "random", seed)
        frozen_rows(table, {"random-encoder": "linear"}, "none", seed, build)
    if "imagenet" in inits:
        build = partial(starting_point, table, "imagenet", 0)
        frozen_rows(table, {"imagenet-features": "linear"}, "imagenet", 0, build)


def starting_point(table: Table, init: str, seed: int):
    """(encoder, its EvalTransform) as pretraining would start with them.

    A random encoder's batch norms keep running statistics of 0 and 1: with those of real images
    the control is much weaker (31 instead of 55 % on the sample).
    """
    data = table.config.data
    images, _ = table.data.pretraining(data.pretrain_on)
    encoder = EncoderConfig(**vars(table.config.encoder), init=init)
    return train_byol.start(encoder, data, images, seed)


def trained_rows(table: Table, name: str, init: str, seed: int, script, more: dict) -> None:
    """Rows whose network is trained on the labels: the script's own run, one folder a cell."""
    for key in table.missing(name, init, seed, table.trained):
        labels, draw = key[2], key[3]
        folder = f"{name}-{init}/seed{seed}-labels{labels}-draw{draw}"
        of_cell = {"data.labels": labels, "data.draw": draw, "run.seed": draw, "run.save_every": 0}
        begun = time.perf_counter()
        config = script.settings(table.typed(folder, of_cell | more))
        result = script.run(config, table.quiet)
        seconds = time.perf_counter() - begun
        table.add(key, result["top1"], seconds, result["protocol"], result["test_images"])


def prepare(config: Config) -> None:
    """Download and pack what is missing: found out now, not after hours."""
    datasets.prepare(config.data)
    for init in config.reproduce.inits:
        fetch(EncoderConfig(**vars(config.encoder), init=init))


def pretrain(table: Table, method: type[Method], init: str, seed: int, folder: str) -> Path:
    """Pretrain, unless that is done; returns the run folder, which lies in the table's."""
    optim = {k: v for k, v in table.config.typed.items() if k.startswith("optim.")}
    typed = table.typed(folder, optim | {"encoder.init": init, "run.seed": seed})
    train_byol.run(train_byol.settings(typed, method), table.processes, method)
    return table.out / folder


def run(config: Config, processes) -> dict:
    """All rows; writes results.json, results.md and results.png into --out."""
    table, r, started = Table(config, processes), config.reproduce, time.perf_counter()
    methods, folders = [method_of(name) for name in config.methods], []
    if len(methods) > 1:
        return compare(table, methods)
    method, m = methods[0], methods[0].name
    control_rows(table, r.inits)
    for init in r.inits:
        trained_rows(table, "baseline", init, 0, train_baseline, {"encoder.init": init})
        for seed in range(r.seeds):
            folders.append(pretrain(table, method, init, seed, f"{m}-{init}-seed{seed}"))
            rows = {f"{m}-knn": "knn", f"{m}-linear": "linear", f"{m}-mlp": "mlp"}
            frozen_rows(table, rows, init, seed, partial(load, folders[-1]))
            more = {"ckpt": str(folders[-1])}
            trained_rows(table, f"{m}-finetune", init, seed, finetune, more)
    rows, claims = table.cells.rows(), table.cells.claims(m)
    total = time.perf_counter() - started
    if processes.main:
        report(table, rows, claims, folders)
    say(processes, f"{table.out}/results.md, .json and .png written; {total / 60:.1f} minutes")
    return {"rows": rows, "claims": claims}


def compare(table: Table, methods: list[type]) -> dict:
    """Pretrain each method with each seed, measure; methods.md, .json and .png in --out."""
    budgets, found = table.config.reproduce.budgets, []
    control_rows(table, ["random"])
    for method in methods:
        rates = []
        for seed in range(table.config.reproduce.seeds):
            folder = pretrain(table, method, "random", seed, f"{method.name}-seed{seed}")
            rows = {f"{method.name}-linear": "linear", f"{method.name}-knn": "knn"}
            frozen_rows(table, rows, "random", seed, partial(load, folder))
            rates += [
                row["images_per_second"] for row in read_metrics(folder / "metrics.jsonl")[1:]
            ]
        found += method_rows(table.cells, method.name, budgets, float(np.median(rates)))
    for name in CONTROLS:
        found += method_rows(table.cells, name, budgets, None)
    text = methods_markdown(found)
    if table.processes.main:
        from eval.pictures import methods_figure, save  # matplotlib is slow to import

        write_json(table.out / "methods.json", found)
        (table.out / "methods.md").write_text(text, encoding="utf-8")
        save(methods_figure(found), table.out / "methods.png")
    say(table.processes, f"\n{text}\n{table.out}/methods.md, .json and .png written")
    return {"rows": found}


def report(table: Table, rows, claims, folders: list[Path]) -> None:
    """Write the table in three forms, the picture of pretraining, and print the table."""
    from eval.pictures import accuracy_figure, curves_figure, save  # matplotlib is slow to import

    c, out, p = table.config, table.out, table.processes
    costs = [read_json(f / "result.json")["seconds"] for f in folders]
    threads = read_json(folders[0] / "config.json")["threads"]
    notes = [
        f"{c.data.dataset}: measured on {rows[0]['test_images']:,} {c.data.evaluate_on} images. "
        f"Pretraining took {sum(costs) / len(costs):.0f} s a seed on {p.world_size} x "
        f"{p.device.type} ({processor(p.device)}), {threads} threads; "
        "`seconds` is the time of one cell beyond that and beyond extracting features.",
        "",
        f"`python reproduce.py {shlex.join(sys.argv[1:])}`, commit {git_commit()}.",
    ]
    if "imagenet" in c.reproduce.inits and c.data.dataset == "stl10":
        notes += ["", "STL-10's images come from ImageNet: its weights have seen these classes."]
    text = markdown(rows, claims, c.reproduce.title, notes)
    write_json(out / "results.json", rows)
    write_json(out / "claims.json", claims)
    (out / "results.md").write_text(text, encoding="utf-8")
    save(accuracy_figure(rows, c.reproduce.title), out / "results.png")
    curves = {f.name: read_metrics(f / "metrics.jsonl") for f in folders}
    save(curves_figure(curves), out / "curves.png")
    say(p, "\n" + text)


def processor(device: torch.device) -> str:
    """The name of the GPU, or of the CPU as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, prepare, argv)


if __name__ == "__main__":
    main()
