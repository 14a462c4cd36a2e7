"""Descriptions of the evaluation protocols, and result records, which name their protocol."""

from statistics import mean, stdev

FROZEN = "frozen encoder in eval mode, float32"
CACHED = f"{FROZEN}, computed once, standardized by the training images"
TOGETHER = "crops or shifts, and flips; encoder trained together with a linear layer"
PIXELS = "raw pixels, at most 32 high"
LOGISTIC = "logistic regression by L-BFGS, free intercept"
STRENGTH = (
    "chosen: L2 strength, by the loss of cross-validation inside the training labels "
    "(above 2,000: on one held-out fifth)"
)
NOTHING = "chosen: nothing; settings are the recipe's"
FIFTH = "by top-1 on a held-out fifth of the training labels; then all of them train"

# Inputs of the classifier in training; how it is fitted; what is chosen, and on which images.
# The metric is always top-1 on the evaluation frame of images that were not used for selection.
PROTOCOLS = {
    "pixels": f"{PIXELS}; {LOGISTIC}; {STRENGTH}",
    "pixels-fixed": f"{PIXELS}; {LOGISTIC}; {NOTHING}",
    "features-linear": f"{CACHED}; {LOGISTIC}; {STRENGTH}",
    "features-linear-fixed": f"{CACHED}; {LOGISTIC}; {NOTHING}",
    "features-mlp": f"{CACHED}; one hidden layer with batch norm, AdamW; {NOTHING}",
    "features-knn": f"{FROZEN}; vote of the 20 nearest by cosine (of all, if fewer), weighted by "
    "exp(cosine / 0.07); chosen: nothing",
    "augmented-linear": f"{FROZEN}, on random crops and flips; linear layer, SGD with Nesterov "
    f"momentum .9, cosine rate, no weight decay; chosen: rate per 256 images, {FIFTH}",
    "network": f"{TOGETHER}; the recipe's optimizer and steps; {NOTHING}",
    "network-sweep": f"{TOGETHER}; the recipe's optimizer; chosen: rate per 256 images x epochs, "
    f"{FIFTH}",
}

PER_FOLD = ("fold", "top1", "chosen", "trials", "lr", "steps", "complete")


def of_head(head: str, strength: float, features: str = "features") -> str:
    """The protocol's name for a classifier on frozen features or pixels.

    head       linear, mlp or knn
    strength   L2 strength; 0 if it is chosen by cross-validation
    features   "features" (computed once), "augmented" or "pixels"
    """
    name = "pixels" if features == "pixels" else f"{features}-{head}"
    fixed = head == "linear" and features != "augmented" and strength > 0
    return f"{name}-fixed" if fixed else name


def record(protocol: str, name: str, config, split, top1: float, **more) -> dict:
    """The content of result.json: top-1, its protocol, and which images it was measured with.

    config   settings with the tables data and run
    split    data.labelled.Split: training images and test images
    """
    PROTOCOLS[protocol]  # KeyError for a protocol that is not described
    data = config.data
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
    """One result.json for all folds: mean and standard deviation of top-1, and shared entries."""
    top1 = [r["top1"] for r in results]
    shared = {k: v for k, v in results[0].items() if k not in PER_FOLD}
    for key in shared:
        if key == "mean_per_class" or key.endswith("nn"):  # such as cosine_200nn
            shared[key] = round(mean(r[key] for r in results), 4)
    return {
        **shared,
        "top1": round(mean(top1), 4),
        "top1_std": round(stdev(top1), 4),
        "fold": "all",
        "folds": top1,
        "chosen_in_folds": [r.get("chosen", r.get("lr")) for r in results],
        "seconds": round(sum(r.get("seconds", 0) for r in results), 1),
    }


def in_words(result: dict) -> str:
    """Top-1 with its spread over folds, and mean_per_class where the two numbers differ."""
    text = f"top-1 {result['top1']:.2f} %"
    if "folds" in result:
        text += f" ± {result['top1_std']:.2f} over {len(result['folds'])} folds"
    per_class = result.get("mean_per_class", result["top1"])  # older results lack it
    if round(per_class, 2) != round(result["top1"], 2):
        text += f" (mean per class {per_class:.2f} %)"
    return text
