"""Supervised training as a method: the baseline from scratch, and fine-tuning."""

from dataclasses import dataclass

from torch import Tensor, nn

from data.views import ViewConfig
from training.method import Method, option


class Baseline(Method):
    """Encoder and linear head trained together on labelled images, with cross-entropy."""

    name = "baseline"
    uses_labels = True
    # As in recipes/stl10.toml; steps instead of epochs, since labels are few.
    defaults = {
        "optim": dict(
            optimizer="sgd", lr=0.1, weight_decay=5e-4, batch_size=96, steps=5000, warmup_epochs=0
        )
    }

    @dataclass
    class Config:
        """[baseline]: augmentation and regularization of the labelled training."""

        area: list[float] = option([0.3, 1.0], "crop's area fraction, from to", low=0.01, high=1)
        flip_p: float = option(0.5, "probability of a mirror image", low=0, high=1)
        shift: int = option(0, "zero border around the image before the crop, pixels", low=0)
        label_smoothing: float = option(0.0, "label smoothing of cross-entropy", low=0, high=0.9)
        sweep_lr: list[float] = option(
            [0.005, 0.01, 0.02, 0.05, 0.1], "--sweep: learning rates (BYOL, App. C.2)", low=0
        )
        sweep_epochs: list[int] = option([30, 50], "--sweep: numbers of epochs", low=1)

        def check(self, label: str) -> None:
            """UserError unless `area` is two values, the smaller first."""
            ViewConfig.supervised(self.area, self.shift, self.flip_p).check(label)

    def __init__(self, encoder: nn.Module, config: Config, classes: int) -> None:
        super().__init__(encoder, config)
        self.head = nn.Linear(encoder.feature_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.views = (ViewConfig.supervised(config.area, config.shift, config.flip_p),)

    def forward(self, view: Tensor) -> dict[str, Tensor]:
        representation = self.encoder(view)
        return {"representation": representation[None], "logits": self.head(representation)}

    def loss(self, outputs, labels):
        logits = outputs["logits"]
        loss = nn.functional.cross_entropy(
            logits, labels, label_smoothing=self.config.label_smoothing
        )
        return loss, {"train_top1": 100 * (logits.argmax(1) == labels).float().mean()}


class Finetune(Baseline):
    """The same training, started from a pretrained encoder."""

    name = "finetune"
    # As in recipes/stl10.toml: BYOL's fine-tuning (App. C.2) without its sweep.
    defaults = {
        "optim": Baseline.defaults["optim"]
        | dict(nesterov=True, lr=0.05, weight_decay=0.0, steps=2500)
    }

    @dataclass
    class Config(Baseline.Config):
        """[finetune]: augmentation and regularization of the labelled training."""
