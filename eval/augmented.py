"""The paper's linear evaluation: a layer trained on frozen features of random crops."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from core.options import option
from data.labelled import Labelled
from data.loader import Loader
from data.views import ViewConfig
from eval.classifiers import Classifier, accuracy
from eval.trained import FrozenEncoder
from training.all_gather import all_gather
from training.loop import peak_rate
from training.method import learning_rate


@dataclass
class AugmentedConfig:
    """[augmented]: linear evaluation on random crops (BYOL, Sec. 4.1, App. C.1)."""

    epochs: int = option(80, "epochs over the training labels", low=1)
    batch_size: int = option(256, "GLOBAL batch size", low=2)
    rates: list[float] = option([0.4, 0.3, 0.2, 0.1, 0.05], "learning rates per 256 images", low=0)
    area: list[float] = option([0.08, 1.0], "area fraction of the crops", low=0.01, high=1)

    def view(self) -> ViewConfig:
        """A random crop and flip."""
        return ViewConfig.supervised(self.area, shift=0, flip_p=0.5)

    def check(self, label: str) -> None:
        """UserError unless `area` is two values, the smaller first."""
        self.view().check(label)


def fit_augmented(
    frozen: FrozenEncoder, labelled: Labelled, config: AugmentedConfig, crop_size: int, seed: int
) -> Classifier:
    """Train a linear layer on `labelled`, at the rate that is best on a held-out fifth of it."""
    rates, trials = config.rates, {}
    if len(rates) > 1:
        part = labelled.hold_out()
        layers = train_layers(frozen, part.train, rates, config, crop_size, seed)
        held = frozen(part.test.images)
        for rate, layer in zip(rates, layers, strict=True):
            trials[rate] = accuracy(layer(held), part.test.labels)
        rates = [max(trials, key=trials.get)]
    (layer,) = train_layers(frozen, labelled, rates, config, crop_size, seed)
    zero = torch.zeros(frozen.encoder.feature_size)
    return Classifier(zero, zero + 1, layer, f"rate {rates[0]:g} per 256", trials)


def crops_of(
    frozen: FrozenEncoder, labelled: Labelled, config: AugmentedConfig, crop_size: int, seed: int
) -> Loader:
    """Loader of random crops and flips of `labelled`, normalized for the encoder."""
    p, transform = frozen.processes, frozen.transform
    size = min(config.batch_size, len(labelled))
    return Loader(
        images=labelled.images,
        labels=labelled.labels,
        views=(config.view(),),
        crop_size=crop_size,
        batch_size=size - size % p.world_size,
        mean=transform.mean,
        std=transform.std,
        seed=seed,
        device=p.device,
        rank=p.rank,
        world_size=p.world_size,
    )


def train_layers(
    frozen: FrozenEncoder,
    labelled: Labelled,
    rates: list[float],
    config: AugmentedConfig,
    crop_size: int,
    seed: int,
) -> list[nn.Linear]:
    """One linear layer for each of `rates`, all trained on the same features in one loop."""
    p, encoder = frozen.processes, frozen.encoder.eval()
    loader = crops_of(frozen, labelled, config, crop_size, seed)
    classes, width = len(labelled.class_names), encoder.feature_size
    layers = nn.ModuleList(nn.Linear(width, classes) for _ in rates).to(p.device)
    for parameter in layers.parameters():
        nn.init.zeros_(parameter)
    groups = [{"params": layer.parameters()} for layer in layers]
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)
    total = config.epochs * loader.steps_per_epoch
    for k in range(total):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = learning_rate(peak_rate("sgd", rate, loader.batch_size), k, 0, total)
        ((views, labels),) = loader.batches(k)
        with torch.no_grad():
            features = all_gather(encoder(*views).float())
        labels = all_gather(labels)  # all ranks hold the global batch and compute the same step
        optimizer.zero_grad()
        sum(cross_entropy(layer(features), labels) for layer in layers).backward()
        optimizer.step()
    return list(layers.cpu())
