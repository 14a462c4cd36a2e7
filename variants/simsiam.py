"""SimSiam (arXiv 2011.10566): BYOL's predictor without a moving target.

python -m variants.simsiam --recipe recipes/sample.toml
"""

from dataclasses import dataclass

from torch import nn
from torch.nn.functional import cosine_similarity

from train_byol import main
from training.method import Method, option
from variants import blocks


class SimSiam(Method):
    """Each view's prediction approaches the other view's projection, which gets no gradient."""

    name = "simsiam"
    defaults = {"optim": dict(optimizer="sgd", lr=0.05, weight_decay=1e-4, warmup_epochs=0)}

    @dataclass
    class Config:
        """[simsiam]: heads."""

        projection: int = option(2048, "hidden and output size of the projector", low=1)
        hidden: int = option(512, "hidden size of the predictor", low=1)

    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        d, h = config.projection, config.hidden
        hidden = blocks(encoder.feature_size, d, bias=False)
        last = nn.Linear(d, d, bias=False), nn.BatchNorm1d(d, affine=False)  # as the authors' code
        self.projector = nn.Sequential(*hidden, *last)
        hidden = nn.Linear(d, h, bias=False), nn.BatchNorm1d(h), nn.ReLU()
        self.predictor = nn.Sequential(*hidden, nn.Linear(h, d))

    def parameter_groups(self, weight_decay):
        """Weight decay on all parameters; the predictor has a constant rate (Sec. 4.1, App. A)."""
        others = [*self.encoder.parameters(), *self.projector.parameters()]
        predictor = [*self.predictor.parameters()]
        return [
            {"params": others, "weight_decay": weight_decay},
            {"params": predictor, "weight_decay": weight_decay, "constant": True},
        ]

    def loss(self, outputs):
        """Mean over both directions of the negative cosine, -1..1 (eq. 2; stop-gradient eq. 3)."""
        (p1, p2), (z1, z2) = outputs["prediction"], outputs["projection"].detach()
        return -(cosine_similarity(p1, z2) + cosine_similarity(p2, z1)).mean() / 2, {}


if __name__ == "__main__":
    main(SimSiam)
