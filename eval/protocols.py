"""What each protocol is, in one table; every result carries the name of its own."""

from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Protocol:
    """images      geometry while learning; measured is always on the evaluation frame
    features    what the classifier sees
    solver      what fits it
    choice      what is chosen, among what, and on which images; never on test images
    """

    images: str
    features: str
    solver: str
    choice: str


FRAME = "evaluation frame"
FROZEN = "frozen encoder in eval mode, float32, computed once, standardised by the training images"
LOGISTIC = "logistic regression by L-BFGS, free intercept"
STRENGTH = (
    "L2 strength among 13 half-decades from 10 to 1e-5, by the loss of 5-fold cross-validation "
    "inside the training labels (one held-out fifth above 2,000)"
)
RECIPE = "nothing here: settings stand in the recipe"

PROTOCOLS = {
    "pixels": Protocol(FRAME, "raw pixels, at most 32 high", LOGISTIC, "as in features-linear"),
    "features-linear": Protocol(FRAME, FROZEN, LOGISTIC, STRENGTH),
    "features-linear-fixed": Protocol(FRAME, FROZEN, LOGISTIC, RECIPE),
    "features-mlp": Protocol(
        FRAME, FROZEN, "one hidden layer with batch norm and dropout, AdamW, cosine rate", RECIPE
    ),
    "features-knn": Protocol(
        FRAME,
        "frozen encoder in eval mode, float32",
        "vote of the 20 nearest by cosine, weighted by exp(cosine / 0.07)",
        "nothing",
    ),
    "augmented-linear": Protocol(
        "random crop and flip",
        "frozen encoder in eval mode, float32, computed anew each epoch",
        "linear layer, SGD with Nesterov momentum .9, cosine rate, no weight decay, 80 epochs",
        "rate among .4 .3 .2 .1 .05 per 256 images, by top-1 on a held-out fifth of the labels",
    ),
    "network": Protocol(
        "crop or shift, and flip", "encoder trained together with a linear layer", "SGD", RECIPE
    ),
    "network-sweep": Protocol(
        "crop or shift, and flip",
        "encoder trained together with a linear layer",
        "SGD",
        "rate x epochs, by top-1 on a held-out fifth of the training labels",
    ),
}


def of_features(head: str, strength: float) -> str:
    """The protocol's name for a head on cached features; `strength` is [linear]'s."""
    return f"features-{head}" + "-fixed" * (head == "linear" and strength > 0)


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
    both = {"top1": round(mean(figures), 4), "top1_std": round(stdev(figures), 4)}
    return results[0] | both | {"fold": "all", "folds": figures}
