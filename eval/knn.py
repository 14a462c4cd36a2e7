"""k-nearest-neighbour accuracy on frozen features."""

import time

import numpy as np
import torch
from torch import Tensor

from data.images import Images
from eval.features import extract


def knn_top1(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    block: int = 512,
) -> float:
    """Top-1 in percent of the cosine k-NN whose neighbours vote with exp(cos / temperature).

    bank (N, D), queries (M, D) and their int64 labels.  As in Wu et al. (arXiv 1805.01978,
    Sec. 3.4).  k is at most N; work goes in blocks of queries.
    """
    bank = torch.nn.functional.normalize(bank, dim=1)
    queries = torch.nn.functional.normalize(queries, dim=1)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    k, right = min(k, len(bank)), 0
    for rows, truth in zip(queries.split(block), labels.split(block), strict=True):
        cosine, index = (rows @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), classes)
        votes.scatter_add_(1, bank_labels[index], (cosine / temperature).exp())
        right += int((votes.argmax(1) == truth).sum())
    return 100 * right / len(queries)


def held_out_order(count: int, seed: int = 0) -> tuple[np.ndarray, int]:
    """An order of `count` labelled images, and how many of its first are held out: a fifth."""
    return np.random.default_rng(seed).permutation(count), max(1, min(count // 5, 2000))


def hold_out_labels(labels: np.ndarray, train_labels: np.ndarray) -> np.ndarray:
    """Pretraining's labels with those of the held-out images unknown (-1), for the online probe.

    The labelled images come first among the pretraining images, see `Dataset.pretraining`.
    """
    order, queries = held_out_order(len(train_labels))
    labels = labels.copy()
    labels[order[:queries]] = -1
    return labels


class HeldOut:
    """Figures during pretraining on labelled TRAIN images held out of the k-NN's bank.

    Never test images, so that watching selects nothing on them.  A fifth of the images (2,000 at
    most) are queries, the others (20,000 at most) the bank; without labels it is never due.

    preparation   mean, std and sizes as `extract` takes them
    """

    def __init__(self, images: Images | None, labels, every: int, preparation: tuple) -> None:
        self.every = every if images is not None and len(images) > 1 else 0
        self.preparation, self.seconds = preparation, 0.0
        if self.every:
            order, self.queries = held_out_order(len(images))
            order = order[: self.queries + 20000]
            self.images, self.labels = images.subset(order), torch.from_numpy(labels[order])

    def due(self, step) -> bool:
        """Every `every` steps and at the end."""
        return bool(self.every) and (step.last or (step.index + 1) % self.every == 0)

    def figures(self, method, processes) -> dict[str, float]:
        """knn_top1, and online_probe_top1 where a probe is trained, in percent; same on all ranks.

        `seconds` then tells what it took.
        """
        begun, n = time.perf_counter(), self.queries
        features = extract(method.encoder, self.images, *self.preparation, processes)
        found = {"knn_top1": knn_top1(features[n:], self.labels[n:], features[:n], self.labels[:n])}
        if hasattr(method, "probe"):
            with torch.no_grad():
                guess = method.probe(features[:n].to(processes.device)).argmax(1).cpu()
            found["online_probe_top1"] = 100 * (guess == self.labels[:n]).float().mean().item()
        self.seconds = time.perf_counter() - begun
        return found
