"""MoCo v3 (arXiv 2104.02057): BYOL's networks with a contrastive loss.

python -m variants.moco_v3 --recipe recipes/sample.toml
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from byol.byol import BYOL
from train_byol import main
from training.all_gather import all_gather
from training.distributed import own_rank
from training.method import option


def contrast(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """InfoNCE of queries against the keys of the GLOBAL batch, times 2 T (eq. 1, Algorithm 1).

    A query's positive is the key of the same image.

    q, k   (B, D) of this rank; k gets no gradient
    """
    q, k = normalize(q, dim=1), all_gather(normalize(k.detach(), dim=1))
    positive = own_rank() * len(q) + torch.arange(len(q), device=q.device)
    return 2 * temperature * cross_entropy(q @ k.T / temperature, positive)


class MoCoV3(BYOL):
    """BYOL's networks and moving target with a contrastive loss."""

    name = "moco_v3"
    defaults = {"optim": {"optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6}}  # 300 epochs

    @dataclass
    class Config(BYOL.Config):
        """[moco_v3]: BYOL's options and a temperature."""

        temperature: float = option(1.0, "temperature of the softmax over the batch", low=0.001)

    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        for projector in (self.projector, self.target_projector):  # in the authors' code
            projector.append(nn.BatchNorm1d(config.projection, affine=False))

    def loss(self, outputs):
        """The sum of both directions (Algorithm 1)."""
        (q1, q2), (k1, k2) = outputs["prediction"], self.targets(outputs)
        t = self.config.temperature
        return contrast(q1, k2, t) + contrast(q2, k1, t), {}


if __name__ == "__main__":
    main(MoCoV3)
