"""What each protocol is, in one table; every result carries the name of its own."""

from statistics import mean, stdev
from typing import NamedTuple


class Protocol(NamedTuple):
    """What is measured is always top-1 on the evaluation frame of images that chose nothing.

    features   what the classifier sees while it learns
    solver     what fits it
    chosen     what is chosen, and on which images
    """

    features: str
    solver: str
    chosen: str


CACHED = "frozen encoder in eval mode, float32, computed once, standardised by the training images"
CROPPED = "frozen encoder in eval mode, float32, on random crops and flips"
TOGETHER = "crops or shifts, and flips; encoder trained together with a linear layer"
LOGISTIC = "logistic regression by L-BFGS, free intercept"
STRENGTH = "L2 strength, by the loss of cross-validation inside the training labels"
NOTHING = "nothing; settings stand in the recipe"
FIFTH = "by top-1 on a held-out fifth of the training labels; then all of them train"

PROTOCOLS = {
    "pixels": Protocol("raw pixels, at most 32 high", LOGISTIC, STRENGTH),
    "pixels-fixed": Protocol("raw pixels, at most 32 high", LOGISTIC, NOTHING),
    "features-linear": Protocol(CACHED, LOGISTIC, STRENGTH),
    "features-linear-fixed": Protocol(CACHED, LOGISTIC, NOTHING),
    "features-mlp": Protocol(CACHED, "one hidden layer with batch norm, AdamW", NOTHING),
    "features-knn": Protocol(
        "frozen encoder in eval mode, float32",
        "vote of the 20 nearest by cosine (of all, if fewer), weighted by exp(cosine / 0.07)",
        "nothing",
    ),
    "augmented-linear": Protocol(
        CROPPED,
        "linear layer, SGD with Nesterov momentum .9, cosine rate, no weight decay",
        f"rate per 256 images, {FIFTH}",
    ),
    "network": Protocol(TOGETHER, "the recipe's optimizer and steps", NOTHING),
    "network-sweep": Protocol(
        TOGETHER, "the recipe's optimizer", f"rate per 256 images x epochs, {FIFTH}"
    ),
}


def of_head(head: str, strength: float, features: str = "features") -> str:
    """The protocol's name; `features` are cached features, augmented or pixels.

    strength   [linear]'s, 0 where it is chosen
    """
    name = features if features == "pixels" else f"{features}-{head}"
    chosen_here = head == "linear" and features != "augmented"  # the strength, unless it is fixed
    return name + "-fixed" * (chosen_here and strength > 0)


def record(protocol: str, name: str, config, split, top1: float, **more) -> dict:
    """What result.json says: the figure, its protocol, and exactly which images it rests on.

    config   with the sections data and run
    split    what was learned from and measured on, a datasets.Split
    """
    data = config.data
    PROTOCOLS[protocol]  # KeyError for one that no table explains
    return {
        "name": name,
        "dataset": data.dataset,
        "protocol": protocol,
        "top1": round(top1, 4),
        "labels": len(split.train),
        "draw": data.draw,
        "fold": data.fold,
        "seed": config.run.seed,
        "measured_on": data.evaluate_on,
        "test_images": len(split.test),
        **more,
    }


def over_folds(results: list[dict]) -> dict:
    """One result of several that differ in the fold: the mean, and the spread over folds."""
    figures = [r["top1"] for r in results]
    own = ("fold", "top1", "chosen", "trials", "lr", "steps", "complete")  # each fold's
    kinds = [k for k in results[0] if k.endswith("nn")]  # of nearest neighbours
    return {
        **{k: v for k, v in results[0].items() if k not in own},
        **{k: round(mean(r[k] for r in results), 4) for k in kinds},
        "top1": round(mean(figures), 4),
        "top1_std": round(stdev(figures), 4),
        "fold": "all",
        "folds": figures,
        "chosen_in_folds": [r.get("chosen", r.get("lr")) for r in results],
        "seconds": round(sum(r.get("seconds", 0) for r in results), 1),
    }
