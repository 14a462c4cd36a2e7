"""Train encoder and classifier together on the labelled images, from a pretrained encoder.

python finetune.py --ckpt runs/byol-sample --labels 100
"""

from baseline.baseline import Finetune
from byol.networks import Encoder
from data import datasets
from train_baseline import DEFAULTS, HIDE, train
from training.command import execute
from training.config import EncoderConfig, OptimConfig, RunConfig
from training.distributed import Processes
from training.run_folder import say
from training.weights import read_ckpt_config


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
        hide=(*HIDE, "init"),
    )
    config.run.out = config.run.out or config.weights.beside("finetune", config.data)
    return config


def run(config, processes: Processes) -> dict:
    """Fine-tune the encoder of --ckpt; returns what result.json holds."""
    data = datasets.load(config.data)
    split = data.evaluation(config.data)
    e = config.encoder
    encoder = Encoder(e.arch, e.stem, e.width)
    config.weights.load_into(encoder, e, f"--ckpt {config.ckpt}")
    mean, std = config.weights.normalisation(split.train)
    say(processes, f"fine-tuning the encoder of {config.ckpt}")
    return train(config, processes, Finetune, encoder, split, data.class_names, mean, std)


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, argv)


if __name__ == "__main__":
    main()
