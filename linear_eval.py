"""Evaluate the frozen features of a pretrained encoder: linear, MLP or k-NN classifier.

python linear_eval.py --ckpt runs/byol-stl10
python linear_eval.py --ckpt runs/byol-stl10 --protocol augmented     # the paper's protocol
python linear_eval.py --ckpt runs/byol-stl10 --folds                  # STL-10's official protocol
python linear_eval.py --ckpt runs/byol-sample --head mlp --labels 100
"""

import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from core.errors import UserError
from core.files import write_json
from core.options import as_dict, flag_of, option, parse
from data import datasets
from data.labelled import Split, each_fold, evaluation
from eval.augmented import AugmentedConfig, fit_augmented
from eval.classifiers import LinearConfig, MLPConfig, accuracy, fit, scores
from eval.knn import knn
from eval.protocols import in_words, of_head, over_folds, record
from eval.trained import (
    CkptConfig,
    Features,
    FrozenEncoder,
    ckpt_config,
    folder_beside,
    from_config,
    prepare,
)
from training.checkpoints import save_file
from training.command import execute
from training.config import EvalRun
from training.distributed import Processes
from training.encoder import portable
from training.run_folder import RunFolder, say


@dataclass(kw_only=True)
class Config(CkptConfig):
    """Settings of an evaluation on frozen features."""

    data: datasets.LabelledData
    run: EvalRun
    linear: LinearConfig
    mlp: MLPConfig
    augmented: AugmentedConfig
    head: str = option(
        "linear",
        "logistic regression, one hidden layer, or nearest neighbors",
        choices=("linear", "mlp", "knn"),
    )
    protocol: str = option(
        "features",
        "train on features computed once, or on features of random crops",
        choices=("features", "augmented"),
    )
    folds: bool = option(False, "stl10: each of the ten folds, mean and standard deviation")


def configure(argv: list[str]) -> Config:
    """The settings from the command line; data set, sizes and encoder default to --ckpt's."""
    config = ckpt_config(Config, parse(Config, argv, __doc__))
    if config.protocol == "augmented" and config.head != "linear":
        raise UserError(f"--protocol augmented is for --head linear, not {config.head}")
    names = [config.head if config.protocol == "features" else config.protocol]
    if config.folds:
        names.append("folds")
    config.run.out = config.run.out or folder_beside(config, *names)
    return config


def run(config: Config, processes: Processes) -> dict:
    """Fit the head on frozen features and measure it; returns the content of result.json."""
    out, started = Path(config.run.out), time.perf_counter()
    data = datasets.load(config.data)
    splits = [evaluation(data, d) for d in each_fold(config.data, config.folds)]
    encoder, transform = from_config(config, splits[0].train.images)  # crop: data/transform.py
    frozen = FrozenEncoder(encoder, transform, processes)
    name = of_head(config.head, config.linear.strength, config.protocol)
    say(
        processes,
        f"{name} on frozen {config.encoder} of {config.ckpt}\n"
        f"{config.data.dataset}: {len(splits[0].train):,} labelled images, "
        f"{len(splits[0].test):,} {config.data.evaluate_on} images; {transform}",
    )
    features = Features(frozen, data if config.folds else None)
    results = []
    for split in splits:
        metrics, classifier = evaluate(config, frozen, features, split)
        method = f"{config.weights.meta.get('method', 'encoder')}-{config.head}"
        results.append(record(name, method, config, split, **metrics))
    result = over_folds(results) if config.folds else results[0]
    result |= {f"pretrain_{k}": config.weights.meta.get(k) for k in ("seed", "step")}
    result["frame"] = [transform.size, transform.crop]
    result["seconds"] = round(time.perf_counter() - started, 1)
    with RunFolder(out, as_dict(config), processes, overwrite=config.run.overwrite):
        if processes.main:
            if classifier and not config.folds:
                save_classifier(out / "classifier.pt", config, frozen, classifier, data.class_names)
            write_json(out / "result.json", result)
    chosen = f", {result['chosen']}" if result.get("chosen") else ""
    say(
        processes,
        f"{out}: {in_words(result)} on {result['test_images']:,} "
        f"{result['measured_on']} images with {result['labels']:,} labels "
        f"({name}{chosen}), {result['seconds']:.0f} s\n"
        f"next: {next_command(config)}",
    )
    return result


def next_command(config: Config) -> str:
    """finetune.py with the flags that were typed for data and encoder, and those it shares."""
    words = ["python", "finetune.py", "--ckpt", config.ckpt]
    for name, value in config.typed.items():
        shared = name.startswith(("data.", "encoder.")) or name in ("recipe", "folds")
        if shared and value is not False:
            words += [flag_of(name)] if value is True else [flag_of(name), str(value)]
    return shlex.join(words)


def save_classifier(path: Path, config, frozen: FrozenEncoder, classifier, classes) -> None:
    """Write classifier.pt: encoder, head, feature statistics and class names."""
    meta = config.weights.meta | config.encoder.shape
    content = {
        "encoder": portable(frozen.encoder),
        "meta": meta | frozen.transform.meta(),
        "head": classifier.head.state_dict(),
        "classes": classes,
        "feature_mean": classifier.mean,
        "feature_std": classifier.std,
    }
    save_file(path, content)


def evaluate(config, frozen: FrozenEncoder, features: Features, split: Split):
    """(metrics, classifier) of one split; the classifier is None for --head knn."""
    classes = len(split.train.class_names)
    test, truth = features(split.test), torch.from_numpy(split.test.labels)
    if config.head == "knn":
        data = features(split.train), torch.from_numpy(split.train.labels), test
        few, usual, many = (min(k, len(split.train)) for k in (5, 20, 200))
        votes = {f"cosine_{k}nn": knn(*data, k=k) for k in (few, usual, many)}
        votes[f"euclidean_{few}nn"] = knn(*data, k=few, euclidean=True)
        metrics = {name: round(accuracy(v, truth), 4) for name, v in votes.items()}
        return scores(votes[f"cosine_{usual}nn"], truth) | metrics, None
    if config.protocol == "augmented":
        crop, seed = config.data.crop_size, config.run.seed
        classifier = fit_augmented(frozen, split.train, config.augmented, crop, seed)
    else:
        x, y = features(split.train), split.train.labels
        classifier = fit(config.head, x, y, classes, config.linear, config.mlp, config.run.seed)
    metrics = scores(classifier(test), truth) | {"chosen": classifier.chosen}
    if config.protocol == "augmented":
        metrics |= {"trials": classifier.trials, "settings": asdict(config.augmented)}
    return metrics, classifier


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    return execute(configure, run, prepare, argv)


if __name__ == "__main__":
    main()
