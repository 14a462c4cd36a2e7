"""Measure the frozen features of a pretrained encoder with a classifier on top.

python linear_eval.py --ckpt runs/byol-stl10
python linear_eval.py --ckpt runs/byol-stl10 --protocol augmented     # as the paper does it
python linear_eval.py --ckpt runs/byol-stl10 --folds                  # STL-10's official protocol
python linear_eval.py --ckpt runs/byol-sample --head mlp --labels 100
"""

import shlex
import time
from dataclasses import asdict
from pathlib import Path

import torch

from byol.networks import EncoderConfig, build_encoder
from data import datasets
from eval.augmented import AugmentedConfig, fit_augmented
from eval.classifiers import LinearConfig, MLPConfig, fit
from eval.features import Features, FrozenEncoder
from eval.knn import euclidean_knn_top1, knn_top1
from eval.protocols import of_head, over_folds, record
from training.checkpoints import save_file
from training.command import execute
from training.config import RunConfig, UserError, as_dict
from training.distributed import Processes
from training.run_folder import RunFolder, say, write_json
from training.weights import read_ckpt_config

HEAD = dict(
    choices=("linear", "mlp", "knn"),
    default="linear",
    help="logistic regression, one hidden layer, or nearest neighbours [linear]",
)
PROTOCOL = dict(
    choices=("features", "augmented"),
    default="features",
    help="features computed once, or a linear layer trained on random crops [features]",
)
HIDE = tuple(
    "pretrain_on init zero_init resume precision batch_norm compile data_on_device "
    "log_every save_every keep check_every replicas_every knn_every stop_after online_probe".split()
)


def configure(argv: list[str]):
    """The settings of an evaluation; data set, sizes and encoder come from --ckpt."""
    sections = {
        "data": datasets.DataConfig,
        "encoder": EncoderConfig,
        "run": RunConfig,
        "linear": LinearConfig,
        "mlp": MLPConfig,
        "augmented": AugmentedConfig,
    }
    extra = ((("--head",), HEAD), (("--protocol",), PROTOCOL), datasets.FOLDS)
    config = read_ckpt_config(argv, sections, description=__doc__, extra=extra, hide=HIDE)
    if config.protocol == "augmented" and config.head != "linear":
        raise UserError(f"--protocol augmented is for --head linear, not {config.head}")
    name = config.head if config.protocol == "features" else config.protocol
    config.run.out = config.run.out or config.weights.beside(name, config.data, config.folds)
    return config


def run(config, processes: Processes) -> dict:
    """Fit the head on frozen features and measure it; returns what result.json holds."""
    out, started = Path(config.run.out), time.perf_counter()

    # data
    data = datasets.load(config.data)
    splits = [data.evaluation(d) for d in datasets.each_fold(config.data, config.folds)]

    # model
    e = config.encoder
    encoder = build_encoder(e)
    config.weights.load_into(encoder, e, f"--ckpt {config.ckpt}")
    mean, std = config.weights.normalisation(splits[0].train.images)
    sizes = datasets.evaluation_sizes(config.data, splits[0].train.images.shape)
    frozen = FrozenEncoder(encoder, mean, std, sizes, processes)
    name = of_head(config.head, config.linear.strength, config.protocol)
    say(
        processes,
        f"{name} on frozen {e.arch} (stem {e.stem}, width {e.width:g}) of "
        f"{config.ckpt}\n{config.data.dataset}: {len(splits[0].train):,} labelled images, "
        f"{len(splits[0].test):,} {config.data.evaluate_on} images",
    )

    # features and classifier
    features = Features(frozen, data if config.folds else None)
    results = []
    for split in splits:
        figures, classifier = evaluate(config, frozen, features, split)
        own = f"{config.weights.meta.get('method', 'encoder')}-{config.head}"
        results.append(record(name, own, config, split, **figures))
    result = over_folds(results) if config.folds else results[0]
    result["pretrain_seed"] = config.weights.meta.get("seed")
    result["seconds"] = round(time.perf_counter() - started, 1)
    with RunFolder(out, as_dict(config), processes, overwrite=config.run.overwrite):
        if processes.main:
            if classifier and not config.folds:
                meta = config.weights.meta | dict(arch=e.arch, stem=e.stem, width=e.width)
                meta |= dict(mean=mean, std=std, frame=list(sizes))
                meta |= dict(stored=min(splits[0].train.images.shape))
                state = {k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}
                content = {"encoder": state, "meta": meta}
                content |= {"head": classifier.head.state_dict(), "classes": data.class_names}
                content |= {"feature_mean": classifier.mean, "feature_std": classifier.std}
                save_file(out / "classifier.pt", content)
            write_json(out / "result.json", result)
    spread = f" ± {result['top1_std']:.2f} over {len(splits)} folds" if config.folds else ""
    chosen = f", {result['chosen']}" if result.get("chosen") else ""
    say(
        processes,
        f"{out}: top-1 {result['top1']:.2f} %{spread} on {result['test_images']:,} "
        f"{result['measured_on']} images with {result['labels']:,} labels "
        f"({name}{chosen}), {result['seconds']:.0f} s\n"
        f"next: python finetune.py --ckpt {shlex.quote(config.ckpt)}",
    )
    return result


def evaluate(config, frozen: FrozenEncoder, features: Features, split):
    """(figures, classifier) of one split; nearest neighbours have no classifier."""
    classes = len(split.train.class_names)
    test, truth = features(split.test), torch.from_numpy(split.test.labels)
    if config.head == "knn":
        known = features(split.train), torch.from_numpy(split.train.labels), test, truth
        few, usual, many = (min(k, len(split.train)) for k in (5, 20, 200))
        figures = {f"cosine_{k}nn": round(knn_top1(*known, k=k), 4) for k in (few, usual, many)}
        figures[f"euclidean_{few}nn"] = round(euclidean_knn_top1(*known, k=few), 4)
        return {"top1": figures[f"cosine_{usual}nn"], **figures}, None
    if config.protocol == "augmented":
        crop, seed = config.data.crop_size, config.run.seed
        classifier = fit_augmented(frozen, split.train, config.augmented, crop, seed)
    else:
        x, y = features(split.train), split.train.labels
        classifier = fit(config.head, x, y, classes, config.linear, config.mlp, config.run.seed)
    figures = {"top1": classifier.top1(test, truth), "chosen": classifier.chosen}
    if config.protocol == "augmented":
        figures |= {"trials": classifier.trials, "settings": asdict(config.augmented)}
    return figures, classifier


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, argv)


if __name__ == "__main__":
    main()
