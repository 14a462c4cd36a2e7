"""Train encoder and classifier together on the labelled images, from a pretrained encoder.

python finetune.py --ckpt runs/byol-sample --labels 100
python finetune.py --ckpt runs/byol-stl10 --sweep   # rate and epochs chosen as in the paper
"""

from dataclasses import dataclass
from functools import partial

from baseline.baseline import Finetune
from core.options import parse, with_method
from data import datasets
from eval import supervised
from eval.supervised import Job, train_all
from eval.trained import CkptConfig, ckpt_config, folder_beside, from_config, prepare
from training.command import execute
from training.distributed import Processes
from training.run_folder import say


@dataclass(kw_only=True)
class CkptTrainConfig(CkptConfig, supervised.Config):
    """Settings of a supervised training that starts from the encoder of --ckpt."""

    data: datasets.LabelledData


Config = with_method(CkptTrainConfig, Finetune)


def configure(argv: list[str]) -> Config:
    """The settings from the command line; data set, sizes and encoder default to --ckpt's."""
    return settings(parse(Config, argv, __doc__))


def settings(typed: dict) -> Config:
    """The settings from parsed flags, {"optim.lr": 0.2, ...}; fills in the default --out."""
    config = ckpt_config(Config, typed)
    config.run.out = config.run.out or folder_beside(config, "finetune", *config.kinds())
    return config


def run(config: Config, processes: Processes) -> dict:
    """Fine-tune the encoder of --ckpt; returns the content of result.json."""
    say(processes, f"fine-tuning the encoder of {config.ckpt}")
    more = {f"pretrain_{k}": config.weights.meta.get(k) for k in ("seed", "step")}
    start = partial(from_config, config)
    return train_all(config, Job(Finetune, start, config.ckpt, processes, more))


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, prepare, argv)


if __name__ == "__main__":
    main()
