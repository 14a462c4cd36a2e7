"""The online probe: a linear classifier that is trained beside a method, on detached features."""

import numpy as np
from torch import nn

from eval.online import held_out_order
from training.method import Method, groups_by_kind


def hold_out_labels(labels: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """Pretraining's labels with those of the held-out images unknown (-1), for the online probe.

    The labelled images come first among the pretraining images, see `Dataset.pretraining`.
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
        """The method's loss plus cross-entropy on the images whose label is known."""
        loss, logs = self.method.loss(outputs)
        logits = outputs["probe"].flatten(0, 1)
        known = (labels >= 0).float().repeat(len(outputs["probe"]))
        labels = labels.clamp(min=0).repeat(len(outputs["probe"]))
        each = nn.functional.cross_entropy(logits, labels, reduction="none")
        probe_loss = (each * known).sum() / known.sum().clamp(min=1)
        return loss + probe_loss, logs | {"probe_loss": probe_loss}

    def parameter_groups(self, weight_decay):
        """The method's own groups, and the probe's, which are as those of any other layer."""
        groups = self.method.parameter_groups(weight_decay)
        return [*groups, *groups_by_kind(self.probe, weight_decay)]

    def after_step(self, progress):
        return self.method.after_step(progress)
