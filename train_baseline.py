"""Train a supervised classifier on the labelled images alone, the baseline of pretraining.

python train_baseline.py --recipe recipes/sample.toml --labels 100
torchrun train_baseline.py --gpus 4 --dataset stl10 --folds
"""

from functools import partial

import train_byol
from baseline.baseline import Baseline
from core.options import make_config, parse, with_method
from eval import supervised
from eval.supervised import Job, train_all
from training.command import execute
from training.distributed import Processes

Config = with_method(supervised.Config, Baseline)


def configure(argv: list[str]) -> Config:
    """The settings from the command line."""
    return settings(parse(Config, argv, __doc__))


def settings(typed: dict) -> Config:
    """The settings from parsed flags, {"optim.lr": 0.2, ...}; fills in the default --out."""
    config = make_config(Config, typed)
    name = "-".join(["baseline", config.data.dataset, *config.kinds()])
    config.run.out = config.run.out or f"runs/{name}"
    return config


def run(config: Config, processes: Processes) -> dict:
    """Train from --init on the labelled images; returns the content of result.json."""
    start = partial(train_byol.start, config.encoder, config.data, seed=config.run.seed)
    return train_all(config, Job(Baseline, start, config.encoder.init, processes))


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, train_byol.prepare, argv)


if __name__ == "__main__":
    main()
