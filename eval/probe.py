"""The online probe: a linear classifier trained beside a method, on detached features."""

import numpy as np
from torch import nn

from eval.online import held_out_order
from training.method import Method, groups_by_kind


def hold_out_labels(labels: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """Pretraining's labels with -1 (unknown) for the held-out images that measure the probe.

    The labelled images come first among those of pretraining, see `Dataset.pretraining`.
    """
    order, queries = held_out_order(len(train_labels))
    labels = labels.copy()
    labels[order[:queries]] = -1
    return labels


class OnlineProbe(Method):
    """Any method with a linear classifier trained beside it on its detached representation."""

    uses_labels = True

    def __init__(self, method: Method, classes: int) -> None:
        nn.Module.__init__(self)
        self.method, self.name, self.views = method, method.name, method.views
        self.probe = nn.Linear(method.encoder.feature_size, classes)

    @property
    def encoder(self):
        return self.method.encoder

    def forward(self, *views):
        outputs = self.method(*views)
        return outputs | {"probe": self.probe(outputs["representation"].detach())}

    def loss(self, outputs, labels):
        """The method's loss plus the mean cross-entropy of the images whose label is known."""
        loss, logs = self.method.loss(outputs)
        logits = outputs["probe"].flatten(0, 1)  # (views x B, classes)
        labels = labels.repeat(len(outputs["probe"]))
        each = nn.functional.cross_entropy(logits, labels, ignore_index=-1, reduction="none")
        probe_loss = each.sum() / (labels >= 0).sum().clamp(min=1)
        return loss + probe_loss, logs | {"probe_loss": probe_loss}

    def parameter_groups(self, weight_decay):
        """The method's groups, and the probe's as those of any other layer."""
        groups = self.method.parameter_groups(weight_decay)
        return [*groups, *groups_by_kind(self.probe, weight_decay)]

    def after_step(self, progress):
        return self.method.after_step(progress)
