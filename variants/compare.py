"""All methods under one budget: one recipe's data, steps and batch; accuracy, spread, cost.

Views are the recipe's too, but for DINO's own; a method's table may set its rate and the like.

python -m variants.compare --recipe recipes/sample.toml --steps 1800 --reproduce.seeds 3
"""

import functools

import numpy as np

import train_byol
from byol.byol import BYOL
from core.errors import UserError
from core.files import write_json
from core.options import RunConfig, read_config
from data.datasets import DataConfig
from eval.classifiers import LinearConfig, MLPConfig
from eval.trained import load, prepare
from reproduce import HIDE, ReproduceConfig, Table, control_rows, frozen, frozen_rows, spell
from training.command import execute
from training.encoder import EncoderConfig
from training.optimizers import OptimConfig
from training.run_folder import read_metrics, say
from variants.barlow_twins import BarlowTwins
from variants.dino import DINO
from variants.moco_v3 import MoCoV3
from variants.simclr import SimCLR
from variants.simsiam import SimSiam
from variants.vicreg import VICReg

METHODS = (BYOL, SimSiam, SimCLR, BarlowTwins, VICReg, MoCoV3, DINO)
CONTROLS = ("raw-pixels", "random-encoder")


def configure(argv: list[str]):
    """The settings that all methods share; the recipe's table of a method beats its [optim]."""
    sections = {
        "data": DataConfig,
        "encoder": EncoderConfig,
        "optim": OptimConfig,
        "run": RunConfig,
        "linear": LinearConfig,
        "mlp": MLPConfig,
        "reproduce": ReproduceConfig,
    }
    config = read_config(argv, sections, description=__doc__, hide=HIDE)
    if not config.recipe:
        raise UserError("--recipe is missing: name one of recipes/*.toml")
    for method in METHODS:  # a mistake in any table shows up now
        train_byol.configure(["--recipe", config.recipe], method)
    config.run.out = config.run.out or "runs/methods"
    return config


def run(config, processes) -> dict:
    """Pretrain each method with each seed, measure; methods.md, .json and .png in --out."""
    table, found = Table(config, processes), []
    control_rows(table, ["random"])
    optim = spell({k: v for k, v in config.flags.items() if k.startswith("optim.")})
    for method in METHODS:
        rates = []
        for seed in range(config.reproduce.seeds):
            folder = f"{method.name}-seed{seed}"
            words = [*table.command(folder), *optim, "--seed", str(seed)]
            train_byol.run(train_byol.configure(words, method), processes, method)
            rows = {f"{method.name}-linear": "linear", f"{method.name}-knn": "knn"}
            features = frozen(table, functools.partial(load, table.out / folder))
            frozen_rows(table, rows, "random", seed, features)
            rows = read_metrics(table.out / folder / "metrics.jsonl")
            rates += [row["images_per_second"] for row in rows[1:]]
        found += rows_of(table, method.name, float(np.median(rates)))
    for name in CONTROLS:
        found += rows_of(table, name, None)
    if processes.main:
        write_json(table.out / "methods.json", found)
        (table.out / "methods.md").write_text(markdown(found), encoding="utf-8")
        from eval.pictures import methods_figure, save  # matplotlib is slow to import

        save(methods_figure(found), table.out / "methods.png")
        say(processes, f"\n{markdown(found)}\n{table.out}/methods.md, .json and .png written")
    return {"rows": found}


def rows_of(table: Table, name: str, rate: float | None) -> list[dict]:
    """A method's or control's figures: the draws' mean of each seed, mean and std over seeds."""
    rows = []
    for kind in ("linear", "knn"):
        for labels in table.config.reproduce.budgets:
            own, init = (name, "none") if name in CONTROLS else (f"{name}-{kind}", "random")
            seeds = table.cells.matrix(own, init, labels)[0]
            if name in CONTROLS and kind == "knn":
                continue
            seeds = seeds.mean(1)
            spread = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
            row = dict(name=name, kind=kind, labels=labels, top1=float(seeds.mean()), std=spread)
            rows.append(row | {"seeds": len(seeds), "images_per_second": rate})
    return rows


def markdown(rows: list[dict]) -> str:
    """One line a method, one column a kind of evaluation and budget; the rate tells the cost."""
    columns = list(dict.fromkeys((r["kind"], r["labels"]) for r in rows))
    heads = [f"{'k-NN' if k == 'knn' else k}, {n:,} labels" for k, n in columns]
    lines = [f"| method | {' | '.join(heads)} | seeds | images/s |", "|---|" + "---|" * len(heads)]
    lines[1] += "---|---|"
    for name in dict.fromkeys(r["name"] for r in rows):
        mine = {(r["kind"], r["labels"]): r for r in rows if r["name"] == name}
        first, cells = next(iter(mine.values())), []
        for column in columns:
            r = mine.get(column)
            spread = f" ± {r['std']:.1f}" if r and r["std"] is not None else ""
            cells.append(f"{r['top1']:.1f}{spread}" if r else "")
        rate = first["images_per_second"]
        cells += [str(first["seeds"]), f"{rate:,.0f}" if rate else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, prepare, argv)


if __name__ == "__main__":
    main()
