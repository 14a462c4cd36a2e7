"""SimSiam (arXiv 2011.10566): BYOL's predictor without a moving target.

python -m variants.simsiam --recipe recipes/sample.toml
torchrun -m variants.simsiam --gpus 4
"""

from dataclasses import dataclass

from torch import nn
from torch.nn.functional import cosine_similarity

from train_byol import main
from training.method import Method, option


class SimSiam(Method):
    """Each view's prediction approaches the other view's projection, whose gradient is stopped."""

    name = "simsiam"
    defaults = {"optim": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 1e-4}}

    @dataclass
    class Config:
        """[simsiam]: heads."""

        projection: int = option(2048, "hidden and output size of the projector", low=1)
        hidden: int = option(512, "hidden size of the predictor", low=1)

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        d = config.projection

        def block(inputs, outputs):
            return nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)

        relu = nn.ReLU(inplace=True)
        self.projector = nn.Sequential(
            *block(encoder.feature_size, d), relu, *block(d, d), relu, *block(d, d)
        )
        self.predictor = nn.Sequential(*block(d, config.hidden), relu, nn.Linear(config.hidden, d))

    def parameter_groups(self, weight_decay):
        """Decay on all parameters; the predictor's rate does not fall (Sec. 4.1, App. A)."""
        others = [*self.encoder.parameters(), *self.projector.parameters()]
        decay = {"weight_decay": weight_decay}
        predictor = {"params": [*self.predictor.parameters()], "constant": True, **decay}
        return [{"params": others, **decay}, predictor]

    def loss(self, outputs):
        """Mean over both directions of the negative cosine, -1..1 (eq. 2; stop-gradient eq. 3)."""
        (p1, p2), (z1, z2) = outputs["prediction"], outputs["projection"].detach()
        return -(cosine_similarity(p1, z2) + cosine_similarity(p2, z1)).mean() / 2, {}


if __name__ == "__main__":
    main(SimSiam)
