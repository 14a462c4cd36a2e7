"""Has it collapsed?  The loss alone cannot say; these figures of the outputs can."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

NAMES = ("representation", "projection", "target_representation", "target")


def spread(x: Tensor) -> float:
    """Standard deviation per dimension of the normalised vectors (N, D), averaged over D.

    0 when all are equal, 1/sqrt(D) when they fill the sphere evenly (arXiv 2011.10566, Sec. 4.1).
    """
    return normalize(x, dim=1).std(0, correction=0).mean().item()


def effective_rank(x: Tensor) -> float:
    """RankMe (arXiv 2210.02885, eq. 1): exp of the entropy of the singular values of (N, D)."""
    if not torch.isfinite(x).all():  # the loop stops with a reason; svdvals would stop without
        return math.nan
    values = torch.linalg.svdvals(x)
    p = values / values.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of two views' normalised vectors, (N, D) each (arXiv 2005.10242)."""
    return (normalize(x, dim=1) - normalize(y, dim=1)).square().sum(1).mean().item()


def uniformity(x: Tensor) -> float:
    """log of the mean of exp(-2 d^2) over all pairs of normalised vectors (arXiv 2005.10242).

    0 when all are equal, about -4 when they fill the sphere evenly.
    """
    return torch.pdist(normalize(x, dim=1)).square().mul(-2).exp().mean().log().item()


def collapse_figures(outputs: dict[str, Tensor]) -> dict[str, float]:
    """{"std/NAME": ..., "rank/NAME", "alignment/NAME", "uniformity/NAME"} of a method's outputs.

    outputs   those of NAMES that the method has, each (views, N, D); alignment is of the first two
    """
    found = {}
    for name in (n for n in NAMES if n in outputs):
        x = outputs[name].double()
        found[f"std/{name}"] = spread(x[0])
        found[f"rank/{name}"] = effective_rank(x[0])
        found[f"uniformity/{name}"] = uniformity(x[0])
        if len(x) > 1:
            found[f"alignment/{name}"] = alignment(x[0], x[1])
    return {key: float(f"{value:.5g}") for key, value in found.items()}


def collapse_alarms(now: dict, start: dict, sizes: dict[str, int]) -> dict[str, str]:
    """What looks like a collapse, as {figure: plain words}; relative to the figures at the start.

    An absolute bound would not do: a random ReLU network starts near collapse itself.  Healthy runs
    stayed above half of the starting std and a third of the starting rank; without a predictor and
    moving average, the projections' std falls to a fortieth within 100 steps.

    sizes   name -> D
    """
    found = {}
    for name, size in sizes.items():
        std, rank = f"std/{name}", f"rank/{name}"
        if std in start and now[std] < start[std] / 4:
            found[std] = (
                f"all images get nearly the same {name.replace('_', ' ')}: its normalised vectors "
                f"vary by {now[std]:.2g} a dimension, {start[std]:.2g} at the start"
            )
        if rank in start and now[rank] < min(start[rank] / 2, size / 40):
            found[rank] = (
                f"the {name.replace('_', ' ')} uses {now[rank]:.3g} of {size} dimensions "
                f"(effective rank), {start[rank]:.3g} at the start"
            )
    return found
