"""k-nearest-neighbor accuracy on frozen features."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    euclidean: bool = False,
    block: int = 512,
) -> Tensor:
    """Votes (M, classes) for queries (M, D) by their k nearest neighbors in bank (N, D).

    Cosine similarity, votes of exp(cos / temperature): Wu et al. (arXiv 1805.01978, Sec. 3.4).
    k           neighbors; N if that is less
    euclidean   Euclidean distance, one vote each, the lowest class in a tie: the 5-NN of the W-MSE
                paper (arXiv 2007.06346, Table 1) and of papers that compare with it
    block       queries at a time, since the similarities of all may not fit into memory
    """
    if not euclidean:
        bank, queries = normalize(bank, dim=1), normalize(queries, dim=1)
    classes, votes = int(bank_labels.max()) + 1, []
    for rows in queries.split(block):
        similarity = -torch.cdist(rows, bank) if euclidean else rows @ bank.T
        nearest, index = similarity.topk(min(k, len(bank)), dim=1)
        weight = torch.ones_like(nearest) if euclidean else (nearest / temperature).exp()
        votes.append(torch.zeros(len(rows), classes).scatter_add_(1, bank_labels[index], weight))
    return torch.cat(votes)


def knn_top1(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, **more) -> float:
    """Top-1 in percent of the class with the most votes; `more` goes to `knn`."""
    guess = knn(bank, bank_labels, queries, **more).argmax(1)
    return 100 * int((guess == labels).sum()) / len(labels)
