"""Train encoder and classifier together on the labelled images, from a pretrained encoder.

python finetune.py --ckpt runs/byol-sample --labels 100
python finetune.py --ckpt runs/byol-stl10 --sweep      # rate and epochs chosen as in the paper
"""

from baseline.baseline import Finetune
from baseline.runs import EXTRA, Job, train_all
from byol.networks import EncoderConfig, build_encoder
from data import datasets
from train_baseline import HIDE, SKIP, train
from training.command import execute
from training.config import OptimConfig, RunConfig
from training.distributed import Processes
from training.run_folder import say
from training.weights import read_ckpt_config

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
    config.run.out = config.run.out or config.weights.beside(
        "finetune", config.data, config.folds, config.sweep
    )
    return config


def run(config, processes: Processes) -> dict:
    """Fine-tune the encoder of --ckpt; returns what result.json holds."""
    say(processes, f"fine-tuning the encoder of {config.ckpt}")

    def start(images):
        encoder = build_encoder(config.encoder)
        config.weights.load_into(encoder, config.encoder, f"--ckpt {config.ckpt}")
        return encoder, *config.weights.normalisation(images)

    more = {"pretrain_seed": config.weights.meta.get("seed")}
    return train_all(config, Job(Finetune, start, processes, more), train)


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, argv)


if __name__ == "__main__":
    main()
