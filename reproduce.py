"""Every row of the results table for one recipe: controls, baseline, pretraining, evaluations.

    python reproduce.py --recipe recipes/sample.toml --out runs/sample

Interrupt it at any time: what is done is skipped when it is started again.  To choose settings, add
`--evaluate-on validation --reproduce.first-draw 1000`: labelled images outside draws that no
table reports take the place of the test images.
"""

import dataclasses
import functools
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import finetune
import train_baseline
import train_byol
from core.errors import UserError
from core.files import read_json, write_json
from core.options import RunConfig, flag_of, option, read_config
from data import datasets
from data.labelled import evaluation
from data.transform import EvalTransform
from eval.classifiers import LinearConfig, MLPConfig, fit
from eval.frozen import Features, FrozenEncoder, pixels
from eval.knn import knn_top1
from eval.protocols import of_head
from eval.table import Cells, markdown
from eval.trained import load
from training import distributed
from training.command import execute
from training.encoder import EncoderConfig, fetch, initialise
from training.optimizers import OptimConfig
from training.run_folder import git_commit, read_metrics, say

HIDE = tuple("labels draw fold init resume overwrite stop_after online_probe seed".split())
SHARED = ("data", "encoder", "run")  # sections whose flags go on to the scripts


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


def configure(argv: list[str], method_class=train_byol.BYOL):
    """The settings of the whole table."""
    sections = {
        "data": datasets.DataConfig,
        "encoder": EncoderConfig,
        "run": RunConfig,
        "linear": LinearConfig,
        "mlp": MLPConfig,
        "reproduce": ReproduceConfig,
    }
    config = read_config(argv, sections, description=__doc__, hide=HIDE)
    if not config.recipe:
        raise UserError("--recipe is missing: name one of recipes/*.toml")
    config.run.out = config.run.out or f"runs/{Path(config.recipe).stem}"
    # The scripts below read the same recipe; a mistake in any of their tables shows up now.
    recipe = ["--recipe", config.recipe]
    sections = {"optim": OptimConfig, "finetune": finetune.Finetune.Config}
    config.optim = train_byol.configure(recipe, method_class).optim
    baseline = train_baseline.configure(recipe)
    tuning = read_config(
        recipe, sections, own="finetune", defaults=finetune.DEFAULTS, skip=train_baseline.SKIP
    )
    budget = min(config.reproduce.budgets)
    for table, settings in {"baseline": baseline, "finetune": tuning}.items():
        if settings.optim.batch_size > budget:
            text = f"batches of [{table}] have {settings.optim.batch_size} images"
            raise UserError(f"--reproduce.budgets {budget}: {text}; lower its batch_size")
    return config


def spell(flags: dict, hide: tuple = ()) -> list[str]:
    """The command line that gives `flags` ({"run.device": "cpu", ...}) again, less those hidden."""
    words = []
    for key, value in flags.items():
        section, name = key.split(".")
        if name in hide:
            continue
        if isinstance(value, bool):
            flag = flag_of(section, name)
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            values = value if isinstance(value, list) else [value]
            words += [flag_of(section, name), *map(str, values)]
    return words


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
        if (batch := config.optim.batch_size) > len(images):
            raise UserError(f"batch_size {batch}: there are only {len(images)} training images")
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

    def command(self, folder: str, hide: tuple = ()) -> list[str]:
        """The command line of a script's run inside this table: ours, with its own --out."""
        out = str(self.out / folder)
        ours = {k: v for k, v in self.config.flags.items() if k.split(".")[0] in SHARED}
        words = spell(ours, ("out", "quiet", "evaluate_on", "seed", *hide))
        return ["--recipe", self.config.recipe, *words, "--out", out, "--resume"]

    def split(self, labels: int, draw: int):
        """The labelled images of one draw and what is measured on."""
        settings = dataclasses.replace(self.config.data, labels=labels, draw=draw)
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


def same_settings(path: Path, config) -> None:
    """UserError where --out holds cells of other settings; what only adds cells may change."""
    settings = {
        "recipe": {k: v for k, v in config.tables.items() if k not in ("reproduce", "run")},
        "flags": {
            k: v for k, v in config.flags.items() if not k.startswith(("run.", "reproduce."))
        },
    }
    if path.exists() and read_json(path) != settings:
        raise UserError(
            f"--out {path.parent} holds a table of another recipe or other flags; "
            "choose another --out"
        )
    write_json(path, settings)


def frozen_rows(table: Table, rows: dict[str, str], init: str, seed: int, extract) -> None:
    """Rows on frozen features: {row name: linear | mlp | knn}, over all budgets and draws.

    extract   function that computes them for a set of images; called only when a cell is missing
    """
    todo = [
        (key, how)
        for name, how in rows.items()
        for key in table.missing(name, init, seed, table.draws)
    ]
    c, classes, features = table.config, len(table.data.class_names), Features(extract, table.data)
    for key, how in todo:
        split = table.split(key[2], key[3])
        x, y = features(split.train), features(split.test)
        begun, truth = time.perf_counter(), torch.from_numpy(split.test.labels)
        if how == "knn":
            top1 = knn_top1(x, torch.from_numpy(split.train.labels), y, truth)
        else:
            top1 = fit(how, x, split.train.labels, classes, c.linear, c.mlp, seed).top1(y, truth)
        source = "pixels" if extract is pixels else "features"
        protocol = of_head(how, c.linear.strength, source)
        table.add(key, top1, time.perf_counter() - begun, protocol, len(truth))


def control_rows(table: Table, inits: list[str]) -> None:
    """Raw pixels, random encoders of the same shape, and untouched ImageNet features."""
    frozen_rows(table, {"raw-pixels": "linear"}, "none", 0, pixels)
    for seed in range(table.config.reproduce.seeds):
        features = frozen(table, lambda seed=seed: starting_point(table, "random", seed))
        frozen_rows(table, {"random-encoder": "linear"}, "none", seed, features)
    if "imagenet" in inits:
        features = frozen(table, lambda: starting_point(table, "imagenet", 0))
        frozen_rows(table, {"imagenet-features": "linear"}, "imagenet", 0, features)


def frozen(table: Table, build):
    """A function of images to the features of an encoder, which is built when it is first called.

    build   gives the encoder and its EvalTransform
    """
    encoder = functools.cache(lambda: FrozenEncoder(*build(), table.processes))
    return lambda images: encoder()(images)


def starting_point(table: Table, init: str, seed: int):
    """(encoder, its EvalTransform) as pretraining would start with them.

    A random encoder's batch norms keep running statistics of 0 and 1: with those of real images
    the control is much weaker (31 instead of 55 % on the sample).
    """
    torch.manual_seed(seed)
    data = table.config.data
    images, _ = table.data.pretraining(data.pretrain_on)
    config = dataclasses.replace(table.config.encoder, init=init)
    encoder, mean, std = initialise(config, images)
    return encoder, EvalTransform.of(data, images.shape, mean, std)


def trained_rows(table: Table, name: str, init: str, seed: int, script, flags: list[str]) -> None:
    """Rows whose network is trained on the labels: the script's own run, one folder a cell."""
    for key in table.missing(name, init, seed, table.trained):
        labels, draw = key[2], key[3]
        folder = f"{name}-{init}/seed{seed}-labels{labels}-draw{draw}"
        begun = time.perf_counter()
        config = script.configure(
            [
                *table.command(folder, train_baseline.HIDE),
                *flags,
                *f"--labels {labels} --draw {draw} --seed {draw} --save-every 0".split(),
                *("--evaluate-on", table.config.data.evaluate_on),
            ]
        )
        result = script.run(config, table.quiet)
        seconds = time.perf_counter() - begun
        table.add(key, result["top1"], seconds, result["protocol"], result["test_images"])


def prepare(config) -> None:
    """Download and pack what is missing: found out now, not after hours."""
    datasets.prepare(config.data)
    for init in config.reproduce.inits:
        fetch(dataclasses.replace(config.encoder, init=init))


def run(config, processes, method_class=train_byol.BYOL) -> dict:
    """All rows; writes results.json, results.md and results.png into --out."""
    started, m = time.perf_counter(), method_class.name
    table, r = Table(config, processes), config.reproduce
    control_rows(table, r.inits)
    folders = []
    for init in r.inits:
        trained_rows(table, "baseline", init, 0, train_baseline, ["--init", init])
        for seed in range(r.seeds):
            folder = f"{m}-{init}-seed{seed}"
            settings = train_byol.configure(
                [*table.command(folder), "--init", init, "--seed", str(seed)], method_class
            )
            train_byol.run(settings, processes, method_class)
            run_folder = table.out / folder
            folders.append(run_folder)
            rows = {f"{m}-knn": "knn", f"{m}-linear": "linear", f"{m}-mlp": "mlp"}
            features = frozen(table, functools.partial(load, run_folder))
            frozen_rows(table, rows, init, seed, features)
            trained_rows(table, f"{m}-finetune", init, seed, finetune, ["--ckpt", str(run_folder)])
    rows, claims = table.cells.rows(), table.cells.claims(m)
    total = time.perf_counter() - started
    if processes.main:
        report(table, rows, claims, folders)
    say(processes, f"{table.out}/results.md, .json and .png written; {total / 60:.1f} minutes")
    return {"rows": rows, "claims": claims}


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


def main(method_class=train_byol.BYOL, argv: list[str] | None = None) -> dict:
    """Run from the command line; with a variant's class, its table."""
    return execute(
        lambda args: configure(args, method_class),
        lambda config, processes: run(config, processes, method_class),
        prepare,
        argv,
    )


if __name__ == "__main__":
    main()
