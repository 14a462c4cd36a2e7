"""Barlow Twins (arXiv 2103.03230): each feature correlates between views, and with no other.

python -m variants.barlow_twins --recipe recipes/sample.toml
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import batch_norm

from train_byol import main
from training.all_gather import all_gather
from training.method import Method, option
from variants import blocks


def cross_correlation(z1: Tensor, z2: Tensor) -> Tensor:
    """Correlation, over the batch, of view 1's features with view 2's: (D, D) (eq. 2).

    z1, z2   (N, D)
    Normalized as in the authors' code, by batch norm without scale and offset.
    """
    z1, z2 = (batch_norm(z, None, None, training=True) for z in (z1, z2))
    return z1.T @ z2 / len(z1)


class BarlowTwins(Method):
    """The cross-correlation of the views' features is trained towards the identity matrix."""

    name = "barlow_twins"
    defaults = {"optim": {"optimizer": "lars", "lr": 0.2, "weight_decay": 1.5e-6}}  # Sec. 2.2

    @dataclass
    class Config:
        """[barlow_twins]: projector and weights of the loss."""

        projection: int = option(2048, "size of the projector's three layers (paper: 8192)", low=1)
        off_diagonal: float = option(0.005, "weight of the redundancy term (lambda)", low=0)
        scale: float = option(0.024, "factor of the whole loss, as in the authors' code", low=0)

    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        d = config.projection
        hidden = blocks(encoder.feature_size, d, bias=False)
        self.projector = nn.Sequential(*hidden, nn.Linear(d, d, bias=False))

    def loss(self, outputs):
        """Weighted squared distance of the GLOBAL batch's correlation to the identity (eq. 1)."""
        z1, z2 = all_gather(outputs["projection"].transpose(0, 1)).unbind(1)
        c = cross_correlation(z1, z2)
        invariance = (c.diagonal() - 1).square().sum()
        redundancy = c.square().sum() - c.diagonal().square().sum()
        loss = self.config.scale * (invariance + self.config.off_diagonal * redundancy)
        return loss, {"invariance": invariance.detach(), "redundancy": redundancy.detach()}


if __name__ == "__main__":
    main(BarlowTwins)
