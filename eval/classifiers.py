"""Classifiers on frozen features: regularized logistic regression, and a small MLP."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from core.errors import UserError
from core.options import option
from data.labelled import stratified_folds

UNCHOSEN = 0.1  # L2 strength where no image can be held out for cross-validation
STRENGTHS = tuple(10 ** (e / 2) for e in range(2, -11, -1))  # 10 to 1e-5, decreasing


@dataclass
class LinearConfig:
    """[linear]: logistic regression on frozen features."""

    strength: float = option(0.0, "L2 on standardized features (0: cross-validated)", low=0)


@dataclass
class MLPConfig:
    """[mlp]: one hidden layer on frozen features."""

    hidden: int = option(512, "hidden size", low=1)
    steps: int = option(2000, "steps of AdamW", low=1)
    batch_size: int = option(256, "images a step", low=2)
    lr: float = option(0.003, "learning rate, cosine to 0", low=0)
    weight_decay: float = option(0.1, "weight decay", low=0)
    dropout: float = option(0.5, "dropout of features and hidden units", low=0, high=0.95)


@dataclass
class Classifier:
    """Standardization and a head: features (N, D) -> logits (N, classes).

    chosen   the setting selected by fitting, as text
    trials   held-out top-1 of each candidate
    """

    mean: Tensor
    std: Tensor
    head: nn.Module
    chosen: str = ""
    trials: dict = field(default_factory=dict)

    def __call__(self, features: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head((features - self.mean) / self.std)

    def top1(self, features: Tensor, labels: Tensor) -> float:
        """Accuracy in percent."""
        return accuracy(self(features), labels)


def accuracy(logits: Tensor, labels) -> float:
    """Top-1 in percent of logits (N, classes) for labels (N,)."""
    return 100 * (logits.argmax(1) == torch.as_tensor(labels)).double().mean().item()


def scores(logits: Tensor, labels) -> dict[str, float]:
    """{"top1": accuracy, "mean_per_class": mean of the classes' accuracies}, in percent."""
    labels = torch.as_tensor(labels)
    within = [accuracy(logits[labels == c], c) for c in labels.unique()]
    mean = sum(within) / len(within)
    return {"top1": round(accuracy(logits, labels), 4), "mean_per_class": round(mean, 4)}


def fit(head: str, features: Tensor, labels: np.ndarray, classes: int, linear, mlp, seed: int):
    """Fit a Classifier to features (N, D); `head` is "linear" or "mlp"."""
    labels = torch.from_numpy(labels)
    if head == "linear":
        return fit_linear(features, labels, classes, linear.strength)
    return fit_mlp(features, labels, classes, mlp, seed)


def mean_and_std(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of features (N, D); std is 1 for constant features."""
    std = features.std(0, correction=0)
    return features.mean(0), torch.where(std > 1e-6, std, 1.0)


def logistic_regression(
    x: Tensor, labels: Tensor, start: Tensor, strength: float, tolerance: float = 1e-6
) -> Tensor:
    """Minimize mean cross-entropy + strength/2 |W|^2 by L-BFGS; intercepts are not penalized.

    x           (N, D) float64, standardized
    start       (D + 1, classes): W, and the intercepts in the last row, as in the result
    tolerance   stop when no entry of the gradient is larger
    """
    theta = start.clone().requires_grad_(True)
    solver = torch.optim.LBFGS(
        [theta],
        max_iter=300,
        tolerance_grad=tolerance,
        tolerance_change=1e-10,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure():
        solver.zero_grad()
        loss = cross_entropy(x @ theta[:-1] + theta[-1], labels)
        loss = loss + strength / 2 * theta[:-1].square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    return theta.detach()


def choose_strength(features: Tensor, labels: Tensor, strengths=STRENGTHS) -> float:
    """The strength with the least cross-validated loss; UNCHOSEN if each class has one image.

    Stratified folds: at most five, and no more than the smallest class has images; a class of one
    image does not count, its image is never held out.  Above 2,000 images one of five is enough.
    The loss decides, since with few labels it is much smoother than the accuracy.  Strengths are
    tried from strong to weak until the loss has risen twice, each solution started from the last.
    """
    classes, counts = int(labels.max()) + 1, labels.bincount()
    if counts.max() < 2:
        return UNCHOSEN
    count = 5 if len(labels) > 2000 else min(5, int(counts[counts > 1].min()))
    folds = stratified_folds(labels.numpy(), count)
    problems, thetas, losses = [], [], []
    for held in folds if len(labels) <= 2000 else folds[:1]:
        kept = torch.from_numpy(np.setdiff1d(np.arange(len(labels)), held))
        mean, std, basis = row_span(features[kept].double())
        x, held_x = ((features[rows] - mean) / std @ basis for rows in (kept, held))
        problems.append((x, labels[kept], held_x, labels[held]))
        thetas.append(x.new_zeros(x.shape[1] + 1, classes))
    for strength in strengths:
        losses.append(0.0)
        for i, (x, y, held_x, held_y) in enumerate(problems):
            # tolerance 1e-3: an error of 1e-4 in the loss, less than two strengths differ by
            thetas[i] = logistic_regression(x, y, thetas[i], strength, 1e-3)
            logits = held_x @ thetas[i][:-1] + thetas[i][-1]
            losses[-1] += cross_entropy(logits, held_y, reduction="sum").item()
        if len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]:
            break
    return strengths[int(np.argmin(losses))]


def row_span(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and std of features (N, D), and a basis (D, min(N, D)) of the standardized rows' span.

    With fewer images than dimensions, the L2-penalized W lies in that span, so regression on N
    coordinates has the same solution as on D.
    """
    mean, std = mean_and_std(features)
    if features.shape[0] >= features.shape[1]:
        return mean, std, torch.eye(features.shape[1], dtype=features.dtype)
    return mean, std, torch.linalg.qr(((features - mean) / std).T).Q


def fit_linear(features: Tensor, labels: Tensor, classes: int, strength: float = 0) -> Classifier:
    """Logistic regression on standardized features; strength 0 calls `choose_strength`."""
    remark = ""
    if not strength:
        strength = choose_strength(features, labels)
        if strength in (STRENGTHS[0], STRENGTHS[-1]):
            remark = " (the edge of the grid)"
        if labels.bincount().max() < 2:
            remark = " (not chosen: one image of each class)"
    mean, std, basis = row_span(features.double())
    x = (features - mean) / std @ basis
    theta = logistic_regression(x, labels, x.new_zeros(x.shape[1] + 1, classes), strength)
    head = nn.Linear(features.shape[1], classes)
    head.weight.data = (basis @ theta[:-1]).T.float().contiguous()
    head.bias.data = theta[-1].float()
    return Classifier(mean.float(), std.float(), head, f"L2 {strength:.3g}" + remark)


def mlp_head(features: int, hidden: int, classes: int, dropout: float = 0.0) -> nn.Sequential:
    """Dropout, one hidden layer with batch norm and ReLU, dropout, linear layer."""
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )


def build_head(state: dict[str, Tensor]) -> nn.Module:
    """The linear or MLP head of a classifier.pt, in eval mode."""
    if "weight" in state:
        classes, features = state["weight"].shape
        head = nn.Linear(features, classes)
    else:
        hidden, features = state["1.weight"].shape
        head = mlp_head(features, hidden, len(state["5.weight"]))
    head.load_state_dict(state)
    return head.eval()


def fit_mlp(
    features: Tensor, labels: Tensor, classes: int, config: MLPConfig, seed: int
) -> Classifier:
    """One hidden layer on standardized features, trained by AdamW with a cosine learning rate."""
    if len(features) < 2:
        raise UserError("--head mlp: batch norm needs two labelled images; take --head linear")
    mean, std = mean_and_std(features)
    x = (features - mean) / std
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = mlp_head(x.shape[1], config.hidden, classes, config.dropout)
        optimizer = torch.optim.AdamW(
            head.parameters(), config.lr, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
        size = min(config.batch_size, len(x))
        for _ in range(config.steps):
            rows = torch.from_numpy(rng.choice(len(x), size, replace=False))
            optimizer.zero_grad()
            cross_entropy(head(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return Classifier(mean, std, head.eval())
