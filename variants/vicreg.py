"""VICReg (arXiv 2105.04906): the views agree, each feature varies, features do not covary.

python -m variants.vicreg --recipe recipes/sample.toml
"""

from dataclasses import dataclass

from torch import Tensor, nn

from train_byol import main
from training.all_gather import all_gather
from training.method import Method, option
from variants import blocks


def variance(z: Tensor) -> Tensor:
    """Mean over features of max(0, 1 - standard deviation), for z (N, D) (eq. 1)."""
    return (1 - (z.var(0) + 1e-4).sqrt()).clamp(min=0).mean()


def covariance(z: Tensor) -> Tensor:
    """Sum of the squared covariances of different features of z (N, D), divided by D (eq. 3, 4)."""
    z = z - z.mean(0)
    c = z.T @ z / (len(z) - 1)
    return (c.square().sum() - c.diagonal().square().sum()) / z.shape[1]


class VICReg(Method):
    """Invariance, variance and covariance of the expander's outputs, which are not normalized."""

    name = "vicreg"
    defaults = {"optim": {"optimizer": "lars", "lr": 0.2, "weight_decay": 1e-6}}  # App. C.1

    @dataclass
    class Config:
        """[vicreg]: expander and weights of the three terms (Sec. 4.2)."""

        projection: int = option(2048, "size of the expander's three layers (paper: 8192)", low=1)
        invariance: float = option(25.0, "weight of the invariance term (lambda)", low=0)
        variance: float = option(25.0, "weight of the variance term (mu)", low=0)
        covariance: float = option(1.0, "weight of the covariance term (nu)", low=0)

    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        d = config.projection
        hidden = blocks(encoder.feature_size, d)
        self.projector = nn.Sequential(*hidden, nn.Linear(d, d, bias=False))

    def loss(self, outputs):
        """Weighted sum of the three terms over the GLOBAL batch (eq. 6).

        As in the authors' code, the variance term is the mean over both views, not the sum, and the
        invariance term is averaged over features, not summed.
        """
        z1, z2 = all_gather(outputs["projection"].transpose(0, 1)).unbind(1)
        terms = {
            "invariance": (z1 - z2).square().mean(),
            "variance": variance(z1) / 2 + variance(z2) / 2,
            "covariance": covariance(z1) + covariance(z2),
        }
        loss = sum(getattr(self.config, name) * term for name, term in terms.items())
        return loss, {name: term.detach() for name, term in terms.items()}


if __name__ == "__main__":
    main(VICReg)
