"""Train a linear or MLP classifier on the frozen features of a pretrained encoder.

python linear_eval.py --ckpt runs/byol-stl10
python linear_eval.py --ckpt runs/byol-sample --head mlp --labels 100
"""

import shlex
import time
from pathlib import Path

import torch

from byol.networks import Encoder
from data import datasets
from eval.classifiers import LinearConfig, MLPConfig, fit
from eval.features import extract
from training.checkpoints import save_file
from training.command import execute
from training.config import EncoderConfig, RunConfig, as_dict
from training.distributed import Processes
from training.run_folder import RunFolder, say, write_json
from training.weights import read_ckpt_config

HEAD = (
    ("--head",),
    dict(
        choices=("linear", "mlp"),
        default="linear",
        help="logistic regression, or one hidden layer [linear]",
    ),
)
HIDE = tuple(
    "pretrain_on init zero_init resume precision batch_norm compile "
    "log_every save_every keep check_every knn_every stop_after online_probe".split()
)


def configure(argv: list[str]):
    """The settings of an evaluation; data set, sizes and encoder come from --ckpt."""
    sections = {
        "data": datasets.DataConfig,
        "encoder": EncoderConfig,
        "run": RunConfig,
        "linear": LinearConfig,
        "mlp": MLPConfig,
    }
    config = read_ckpt_config(argv, sections, description=__doc__, extra=(HEAD,), hide=HIDE)
    config.run.out = config.run.out or config.weights.beside(config.head, config.data)
    return config


def run(config, processes: Processes) -> dict:
    """Fit the head on frozen features and measure it; returns what result.json holds."""
    out, started = Path(config.run.out), time.perf_counter()

    # data
    data = datasets.load(config.data)
    split = data.evaluation(config.data)

    # model
    e = config.encoder
    encoder = Encoder(e.arch, e.stem, e.width)
    config.weights.load_into(encoder, e, f"--ckpt {config.ckpt}")
    encoder.to(processes.device, memory_format=torch.channels_last)
    mean, std = config.weights.normalisation(split.train)
    say(
        processes,
        f"{config.head} head on frozen {e.arch} (stem {e.stem}, width {e.width:g}) of "
        f"{config.ckpt}\n{config.data.dataset}: {len(split.train):,} labelled images, "
        f"{len(split.test):,} {config.data.evaluate_on} images",
    )

    # features and classifier
    sizes = datasets.evaluation_sizes(config.data, split.train.shape)
    train = extract(encoder, split.train, mean, std, sizes, processes)
    test = extract(encoder, split.test, mean, std, sizes, processes)
    truth = torch.from_numpy(split.test_labels)
    classifier = fit(
        config.head,
        train,
        torch.from_numpy(split.train_labels),
        len(data.class_names),
        config.linear,
        config.mlp,
        config.run.seed,
    )
    result = {
        "name": f"{config.weights.meta.get('method', 'encoder')}-{config.head}",
        "dataset": config.data.dataset,
        "protocol": f"features, {classifier.how}",
        "top1": round(classifier.top1(test, truth), 4),
        "labels": len(split.train),
        "draw": config.data.draw,
        "fold": config.data.fold,
        "measured_on": config.data.evaluate_on,
        "images": len(split.test),
        "seconds": round(time.perf_counter() - started, 1),
    }
    with RunFolder(out, as_dict(config), processes, overwrite=config.run.overwrite):
        if processes.main:
            save_file(
                out / "classifier.pt",
                {
                    "encoder": config.weights.state_dict,
                    "head": classifier.head.state_dict(),
                    "feature_mean": classifier.mean,
                    "feature_std": classifier.std,
                    "meta": config.weights.meta,
                    "classes": data.class_names,
                },
            )
            write_json(out / "result.json", result)
    say(
        processes,
        f"{out}: top-1 {result['top1']:.2f} % on {result['images']:,} "
        f"{result['measured_on']} images with {result['labels']:,} labels "
        f"({result['protocol']}), {result['seconds']:.0f} s\n"
        f"next: python finetune.py --ckpt {shlex.quote(config.ckpt)}",
    )
    return result


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, argv)


if __name__ == "__main__":
    main()
