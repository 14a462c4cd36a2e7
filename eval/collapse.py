"""Collapse metrics: spread, effective rank, alignment and uniformity of a method's outputs."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

NAMES = ("representation", "projection", "target_representation", "target")


def spread(x: Tensor) -> float:
    """Standard deviation of the L2-normalized vectors (N, D) over N, averaged over D.

    0 if all are equal, 1/sqrt(D) if they are uniform on the sphere (arXiv 2011.10566, Sec. 4.1).
    """
    return normalize(x, dim=1).std(0, correction=0).mean().item()


def effective_rank(x: Tensor) -> float:
    """RankMe (arXiv 2210.02885, eq. 1): exp of the entropy of the singular values of x (N, D)."""
    if not torch.isfinite(x).all():  # svdvals would raise; the loop's own error says more
        return math.nan
    values = torch.linalg.svdvals(x)
    p = values / values.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of two views' L2-normalized vectors (N, D) (arXiv 2005.10242)."""
    return (normalize(x, dim=1) - normalize(y, dim=1)).square().sum(1).mean().item()


def uniformity(x: Tensor) -> float:
    """log of the mean of exp(-2 d^2) over all pairs of L2-normalized vectors (arXiv 2005.10242).

    0 if all are equal, about -4 if they are uniform on the sphere.
    """
    return torch.pdist(normalize(x, dim=1)).square().mul(-2).exp().mean().log().item()


def collapse_metrics(outputs: dict[str, Tensor]) -> dict[str, float]:
    """{"std/NAME": ..., "rank/NAME", "uniformity/NAME", "alignment/NAME"}, to five digits.

    outputs   name -> (views, N, D), others than NAMES left out; alignment is of the first two views
    """
    metrics = {}
    for name in [n for n in NAMES if n in outputs]:
        x = outputs[name].double()
        metrics[f"std/{name}"] = spread(x[0])
        metrics[f"rank/{name}"] = effective_rank(x[0])
        metrics[f"uniformity/{name}"] = uniformity(x[0])
        if len(x) > 1:
            metrics[f"alignment/{name}"] = alignment(x[0], x[1])
    return {key: float(f"{value:.5g}") for key, value in metrics.items()}


def collapse_warnings(history: list[dict], sizes: dict[str, int], grace: int) -> list[str]:
    """Warnings of a collapse from step `grace` on: one line for each metric, the oldest first.

    Compared with the first step, since a random ReLU network starts near collapse.  Healthy runs
    stayed above half of the starting std and a third of the starting rank; without predictor and
    moving average, the projections' std falls to a fortieth within 100 steps.

    history   rows of metrics.jsonl with collapse metrics
    sizes     dimensions D of each output, by name
    """
    start, *later = history
    if start["step"] > 0:  # the run began without online evaluation
        return []
    warnings: dict[str, str] = {}
    for now in [row for row in later if row["step"] >= grace]:
        for name, size in sizes.items():
            std, rank, words = f"std/{name}", f"rank/{name}", name.replace("_", " ")
            if now[std] < start[std] / 4:
                text = f"all images get nearly the same {words}: standard deviation {now[std]:.2g}"
                warnings.setdefault(std, f"{text}, {start[std]:.2g} at the start")
            if now[rank] < min(start[rank] / 2, size / 40):
                text = f"the {words} uses {now[rank]:.3g} of {size} dimensions (effective rank)"
                warnings.setdefault(rank, f"{text}, {start[rank]:.3g} at the start")
    return list(warnings.values())
