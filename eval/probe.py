"""The online probe: a linear classifier trained along with a method, on detached features."""

import torch
from torch import nn

from core.errors import UserError
from training.distributed import sum_over_ranks
from training.method import Method, groups_by_kind


class OnlineProbe(Method):
    """Any method, and a linear classifier trained on its detached representation."""

    uses_labels = probed = True

    def __init__(self, method: Method, classes: int) -> None:
        nn.Module.__init__(self)
        self.method, self.name, self.views = method, method.name, method.views
        self.probe = nn.Linear(method.encoder.feature_size, classes)

    @property
    def encoder(self):
        return self.method.encoder

    def forward(self, *views):
        outputs = self.method(*views)
        if "representation" not in outputs:
            text = "forward has no output named representation"
            raise UserError(f"--online-probe: {self.method.name}'s {text}")
        return outputs | {"probe": self.probe(outputs["representation"].detach())}

    def loss(self, outputs, labels):
        """The method's loss plus the probe's mean cross-entropy over images of known label.

        The mean is over those of all ranks, but of one micro-batch.
        """
        loss, logs = self.method.loss(outputs, *[labels] * self.method.uses_labels)
        logits = outputs["probe"].flatten(0, 1)  # (views x B, classes)
        labels = labels.repeat(len(outputs["probe"]))
        each = nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        known = (labels >= 0).sum()
        known, ranks = sum_over_ranks(torch.stack([known, torch.ones_like(known)]))
        probe_loss = ranks * each.sum() / known.clamp(min=1)  # DDP averages over ranks
        return loss + probe_loss, logs | {"probe_loss": probe_loss}

    def parameter_groups(self, weight_decay):
        """The method's groups and, grouped as by default, the probe's."""
        groups = self.method.parameter_groups(weight_decay)
        return [*groups, *groups_by_kind(self.probe, weight_decay)]

    def after_step(self, progress):
        return self.method.after_step(progress)

    def learning_rate(self, *arguments):
        return self.method.learning_rate(*arguments)
