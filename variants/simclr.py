"""SimCLR (arXiv 2002.05709): two views of an image attract, those of other images repel.

python -m variants.simclr --recipe recipes/sample.toml
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from byol.byol import mlp
from train_byol import main
from training.all_gather import all_gather
from training.distributed import own_rank
from training.method import Method, option


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding a view's other view among all views of the GLOBAL batch (eq. 1).

    z   (2, B, D), this rank's projections
    """
    z = normalize(z, dim=2)
    batch = z.shape[1]
    everything = all_gather(z.transpose(0, 1))  # (world B, 2, D): a row is an image
    logits = z.flatten(0, 1) @ everything.flatten(0, 1).T / temperature
    first = 2 * (own_rank() * batch + torch.arange(batch, device=z.device))  # view 1's columns
    itself, other = torch.cat([first, first + 1]), torch.cat([first + 1, first])
    logits = logits.scatter(1, itself[:, None], float("-inf"))
    return cross_entropy(logits, other)


class SimCLR(Method):
    """An encoder and a projector, trained by the normalized temperature-scaled cross-entropy.

    Batch statistics are per view; the authors' are of both views together.  The views are the
    recipe's.  The paper's have stronger color jitter: brightness, contrast and saturation 0.8, hue
    0.2 (App. A), where BYOL's have 0.4, 0.4, 0.2 and 0.1.
    """

    name = "simclr"
    defaults = {"optim": {"optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6}}  # Sec. 2.2

    @dataclass
    class Config:
        """[simclr]: head and temperature."""

        hidden: int = option(2048, "hidden size of the projector", low=1)
        projection: int = option(128, "output size of the projector", low=1)
        temperature: float = option(0.5, "temperature of the softmax over the batch", low=0.001)

    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        self.projector = mlp(encoder.feature_size, config.hidden, config.projection)
        self.projector.append(nn.BatchNorm1d(config.projection))  # in the authors' code
        self.projector[-1].bias.requires_grad_(False)  # stays 0, as there

    def loss(self, outputs):
        """Mean over both views of all images (Algorithm 1)."""
        return nt_xent(outputs["projection"], self.config.temperature), {}


if __name__ == "__main__":
    main(SimCLR)
