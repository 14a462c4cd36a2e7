"""k-nearest-neighbour accuracy on frozen features."""

import torch
from torch import Tensor


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
    normalize = torch.nn.functional.normalize
    bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)

    def nearest(rows):
        cosine, index = (rows @ bank.T).topk(min(k, len(bank)), dim=1)
        return index, (cosine / temperature).exp()

    return _vote(nearest, bank_labels, queries, labels, block)


def euclidean_knn_top1(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, *, k: int = 5, block=512
) -> float:
    """Top-1 in percent of the plain k-NN: Euclidean distance, one vote each, lowest class in a tie.

    The 5-NN of the W-MSE paper (arXiv 2007.06346, Table 1) and of those that compare with it.
    """

    def nearest(rows):
        index = torch.cdist(rows, bank).topk(min(k, len(bank)), dim=1, largest=False).indices
        return index, torch.ones(index.shape)

    return _vote(nearest, bank_labels, queries, labels, block)


def _vote(nearest, bank_labels: Tensor, queries: Tensor, labels: Tensor, block: int) -> float:
    """Top-1 in percent, a block of queries at a time: 105,000 x 8,000 would not fit."""
    classes, right = int(max(bank_labels.max(), labels.max())) + 1, 0
    for rows, truth in zip(queries.split(block), labels.split(block), strict=True):
        index, weight = nearest(rows)
        votes = torch.zeros(len(rows), classes).scatter_add_(1, bank_labels[index], weight)
        right += int((votes.argmax(1) == truth).sum())
    return 100 * right / len(queries)
