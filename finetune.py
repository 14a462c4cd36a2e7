"""Train encoder and classifier together on the labelled images, from a pretrained encoder.

python finetune.py --ckpt runs/byol-sample --labels 100
python finetune.py --ckpt runs/byol-stl10 --sweep      # rate and epochs chosen as in the paper
"""

from functools import partial

from baseline.baseline import Finetune
from core.options import RunConfig
from data import datasets
from eval.supervised import EXTRA, Job, train_all
from eval.trained import folder_beside, from_config, prepare, read_ckpt_config
from train_baseline import HIDE, SKIP, train
from training.command import execute
from training.distributed import Processes
from training.encoder import EncoderConfig
from training.optimizers import OptimConfig
from training.run_folder import say

# As in recipes/stl10.toml: BYOL's fine-tuning (App. C.2), without its sweep.
DEFAULTS = {
    "optim": dict(
        optimizer="sgd",
        nesterov=True,
        lr=0.05,
        weight_decay=0.0,
        batch_size=100,
        steps=2500,
        warmup_epochs=0,
    )
}


def configure(argv: list[str]):
    """The settings of a fine-tuning run; data set, sizes and encoder come from --ckpt."""
    sections = {
        "data": datasets.DataConfig,
        "encoder": EncoderConfig,
        "optim": OptimConfig,
        "run": RunConfig,
        "finetune": Finetune.Config,
    }
    config = read_ckpt_config(
        argv,
        sections,
        own="finetune",
        defaults=DEFAULTS,
        description=__doc__,
        extra=EXTRA,
        hide=(*HIDE, "init"),
        skip=SKIP,
    )
    kind = config.folds, config.sweep
    beside = folder_beside(config.weights, "finetune", config.data, *kind)
    config.run.out = config.run.out or beside
    return config


def run(config, processes: Processes) -> dict:
    """Fine-tune the encoder of --ckpt; returns what result.json holds."""
    say(processes, f"fine-tuning the encoder of {config.ckpt}")
    more = {"pretrain_seed": config.weights.meta.get("seed")}
    return train_all(config, Job(Finetune, partial(from_config, config), processes, more), train)


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, prepare, argv)


if __name__ == "__main__":
    main()
