"""DINO (arXiv 2104.14294): from any crop, predict a moving-average teacher's output for large ones.

python -m variants.dino --recipe recipes/sample.toml
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from byol.byol import normalize, target_decay
from data.views import View2Config, ViewConfig
from train_byol import main
from training.distributed import sum_over_ranks
from training.method import Method, option
from variants import blocks


class Prototypes(nn.Linear):
    """Cosine similarities with k prototypes, the rows of the weight: (B, d) -> (B, k) (App. C)."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # half precision is too coarse here
            return normalize(x.to(self.weight.dtype)) @ normalize(self.weight).T


class DINO(Method):
    """The student predicts the teacher's centered and sharpened scores.

    The encoder that is evaluated and saved is the teacher's, which is the better one (Sec. 5.2).
    Learning rate, decay, areas, temperatures and tau are the authors' for a ResNet-50; prototypes
    and small crops are fewer.  Left out: warm-up of the teacher's temperature, frozen prototypes in
    the first epoch, gradient clipping, a schedule of weight decay.
    """

    name = "dino"
    defaults = {"optim": {"optimizer": "sgd", "lr": 0.03, "weight_decay": 1e-4}}

    @dataclass
    class Config:
        """[dino]: head, crops, temperatures, teacher (Sec. 3.1, App. C)."""

        hidden: int = option(2048, "hidden size of the head", low=1)
        prototypes: int = option(4096, "number of prototypes (paper: 65536)", low=2)
        local_views: int = option(4, "number of small crops", low=1)
        local_size: int = option(48, "side of the small crops, pixels", low=8)
        local_area: float = option(0.14, "largest area fraction of a small crop", low=0.05, high=1)
        teacher_temperature: float = option(0.04, "temperature of the teacher's softmax", low=0.001)
        base_tau: float = option(0.996, "EMA decay of the teacher at the first step", low=0, high=1)

    def __init__(self, encoder, config):
        super().__init__(encoder, config)
        # batch norm is an option of the authors' code; without it short runs do not learn
        last = nn.Linear(config.hidden, 256), Prototypes(256, config.prototypes, bias=False)
        self.head = nn.Sequential(*blocks(encoder.feature_size, config.hidden, nn.GELU), *last)
        self.student = copy.deepcopy(nn.Sequential(encoder, self.head))
        self.requires_grad_(False).student.requires_grad_(True)  # encoder and head are the teacher
        self.register_buffer("center", torch.zeros(config.prototypes))
        # sum and number of the mean teacher outputs of all ranks, zeroed after each applied step
        self.register_buffer("seen", torch.zeros(config.prototypes + 1))
        small = ViewConfig(size=config.local_size, area=[0.05, config.local_area], blur_p=0.5)
        large = dict(area=[config.local_area, 1.0])
        self.views = ViewConfig(**large), View2Config(**large), *[small] * config.local_views

    def forward(self, *views):
        """Representation and target of the large crops; the student's prediction for all crops.

        As in the authors' code, an encoder's batch statistics are of all crops of one size, a
        head's of all its inputs.
        """
        large, small = torch.cat(views[:2]), torch.cat(views[2:])
        encoder, head = self.student
        outputs = {"prediction": head(torch.cat([encoder(large), encoder(small)]))}
        outputs["representation"] = y = self.encoder(large)
        outputs["target"] = self.head(y)
        return {name: x.unflatten(0, (-1, len(views[0]))) for name, x in outputs.items()}

    def loss(self, outputs):
        """Mean cross-entropy over pairs of a large crop and any other crop (eq. 2)."""
        p = ((outputs["target"] - self.center) / self.config.teacher_temperature).softmax(2)
        log_q = (outputs["prediction"] / 0.1).log_softmax(2)
        pairs = [(t, s) for t in range(2) for s in range(len(log_q)) if s != t]
        mean = outputs["target"].mean((0, 1))
        self.seen += sum_over_ranks(torch.cat([mean, torch.ones_like(mean[:1])]))
        return -sum((p[t] * log_q[s]).sum(1).mean() for t, s in pairs) / len(pairs), {}

    def after_step(self, progress):
        tau = target_decay(self.config.base_tau, progress)
        self.center.lerp_(self.seen[:-1] / self.seen[-1], 0.1)  # eq. 4, m = 0.9
        self.seen.zero_()
        teacher = [*self.encoder.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(teacher, [p.detach() for p in self.student.parameters()], 1 - tau)
        return {"tau": tau}


if __name__ == "__main__":
    main(DINO)
