"""BYOL, Bootstrap Your Own Latent (arXiv 2006.07733): networks, loss and moving target."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.options import option
from training.all_gather import all_gather
from training.method import Method


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos(prediction, target) for each image: (B, D), (B, D) -> (B,), in 0..4 (eq. 2)."""
    return 2 - 2 * (normalize(prediction) * normalize(target)).sum(dim=-1)


def normalize(x: Tensor) -> Tensor:
    """x / sqrt(max(sum x^2, 1e-12)) along the last dimension, as in the authors' code."""
    return x * x.square().sum(dim=-1, keepdim=True).clamp(min=1e-12).rsqrt()


def whiten(z: Tensor) -> Tensor:
    """Targets (2, B, D), each view centered, decorrelated over the GLOBAL batch; no gradient.

    As in W-MSE (arXiv 2007.06346), by the inverse of the covariance's Cholesky factor.  First, the
    covariance is divided by its norm and 0.01 is added to its diagonal, so that no direction is
    enlarged more than tenfold; weak ones therefore stay somewhat weaker and correlated.
    """
    everything = all_gather(z.transpose(0, 1))  # (N, 2, D)
    mean = everything.mean(0)
    x = (everything - mean).flatten(0, 1)
    covariance = x.T @ x
    covariance /= torch.linalg.vector_norm(covariance).clamp(min=1e-12)
    covariance.diagonal().add_(0.01)
    factor = torch.linalg.cholesky_ex(covariance).L  # without _ex, the CPU would wait for the GPU
    return torch.linalg.solve_triangular(factor, (z - mean[:, None]).mT, upper=False).mT


def target_decay(base_tau: float, progress: float) -> float:
    """tau_k = 1 - (1 - base_tau)(cos(pi k/K) + 1)/2, from base_tau towards 1 (Sec. 3.3).

    progress   k/K, the step over the number of steps
    """
    return 1 - (1 - base_tau) * (math.cos(math.pi * progress) + 1) / 2


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear - BatchNorm - ReLU - Linear without bias: projector and predictor (Sec. 3.3).

    No batch norm follows the last layer.  Weights start as in the authors' code (haiku's default):
    normal with standard deviation s = 1/sqrt(inputs), truncated at 2 s, so in effect 0.88 s.
    """
    layers = nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden, eps=1e-5, momentum=0.1),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs, bias=False),
    )
    for layer in (layers[0], layers[3]):
        scale = layer.in_features**-0.5
        nn.init.trunc_normal_(layer.weight, std=scale, a=-2 * scale, b=2 * scale)
    nn.init.zeros_(layers[0].bias)
    return layers


class BYOL(Method):
    """The online network predicts the target network's projection of the other view."""

    name = "byol"

    @dataclass
    class Config:
        """[byol]: heads and moving target."""

        base_tau: float = option(0.99, "EMA decay of the target at the first step", low=0, high=1)
        tau_schedule: str = option(
            "cosine", "EMA decay: rises to 1 by a cosine, or fixed", choices=("cosine", "constant")
        )
        hidden: int = option(4096, "hidden size of projector and predictor", low=1)
        projection: int = option(256, "output size of projector and predictor", low=1)
        predictor: bool = option(True, "without a predictor the outputs collapse (Table 5b)")
        whiten: bool = option(False, "decorrelate the targets over the batch (not the paper's)")

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        self.projector = mlp(encoder.feature_size, config.hidden, config.projection)
        head = config.projection, config.hidden, config.projection
        self.predictor = mlp(*head) if config.predictor else nn.Identity()
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, view1: Tensor, view2: Tensor) -> dict[str, Tensor]:
        """Outputs of both networks, one view at a time: batch statistics are per view."""
        views = (view1, view2)
        with torch.no_grad():  # the target learns by moving average only
            # first, so that its activations are freed before the online network's are kept
            target_y = [self.target_encoder(view) for view in views]
            target_z = [self.target_projector(y) for y in target_y]
        online_y = [self.encoder(view) for view in views]
        online_z = [self.projector(y) for y in online_y]
        online_q = [self.predictor(z) for z in online_z]
        return {
            "representation": torch.stack(online_y),
            "projection": torch.stack(online_z),
            "prediction": torch.stack(online_q),
            "target_representation": torch.stack(target_y),
            "target": torch.stack(target_z),
        }

    def loss(self, outputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean of the SUM of both directions: 0..8, 4 for random outputs (Sec. 3.1)."""
        (q1, q2), (z1, z2) = outputs["prediction"], self.targets(outputs)
        return (regression_loss(q1, z2) + regression_loss(q2, z1)).mean(), {}

    def targets(self, outputs: dict[str, Tensor]) -> Tensor:
        """The target's projections (2, B, D), whitened or not, to be predicted."""
        z = outputs["target"].detach()
        return whiten(z) if self.config.whiten else z

    @torch.no_grad()
    def after_step(self, progress: float) -> dict[str, float]:
        """target <- tau target + (1 - tau) online, for the parameters (eq. 1).

        The target's batch-norm statistics come from its own forward passes.
        """
        tau = self.config.base_tau
        if self.config.tau_schedule == "cosine":
            tau = target_decay(tau, progress)
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        target = [*self.target_encoder.parameters(), *self.target_projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - tau)
        return {"tau": tau}
