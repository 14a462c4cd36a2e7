"""Nearest neighbours against a loop and against scikit-learn."""

import resource

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from eval.knn import euclidean_knn_top1, knn_top1


def naive(bank, bank_labels, queries, labels, k, temperature) -> float:
    right = 0
    for query, label in zip(queries, labels, strict=True):
        cosines = [x @ query / np.linalg.norm(x) / np.linalg.norm(query) for x in bank]
        votes = {}
        for i in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            weight = np.exp(cosines[i] / temperature)
            votes[bank_labels[i]] = votes.get(bank_labels[i], 0) + weight
        right += max(votes, key=votes.get) == label
    return 100 * right / len(queries)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 1.0), (500, 0.07)])
def test_it_is_the_weighted_vote_of_the_nearest(k, temperature):
    rng = np.random.default_rng(k)
    labels = rng.integers(0, 5, 130)
    x = rng.normal(size=(5, 6))[labels] + rng.normal(size=(130, 6))
    x *= rng.uniform(0.1, 10, (130, 1))  # lengths don't matter
    expected = naive(x[:90], labels[:90], x[90:], labels[90:], k, temperature)
    t = torch.from_numpy(x).float(), torch.from_numpy(labels)
    found = knn_top1(t[0][:90], t[1][:90], t[0][90:], t[1][90:], k=k, temperature=temperature,
                     block=7)  # fmt: skip
    assert found == pytest.approx(expected)
    assert 30 < found < 100


def clusters(count=300, size=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, count)
    x = rng.normal(size=(5, size))[labels] + rng.normal(size=(count, size))
    return x * rng.uniform(0.5, 2, (count, 1)), labels


def halves(x, labels):
    t = torch.from_numpy(x).float(), torch.from_numpy(labels)
    return t[0][:200], t[1][:200], t[0][200:], t[1][200:]


@pytest.mark.parametrize("k", [5, 20, 200])
def test_cosine_is_scikit_learns(k):
    x, labels = clusters()
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = 100 * theirs.fit(x[:200], labels[:200]).score(x[200:], labels[200:])
    assert knn_top1(*halves(x, labels), k=k, block=33) == pytest.approx(expected)


@pytest.mark.parametrize("k", [1, 5, 200])
def test_euclidean_is_scikit_learns(k):
    x, labels = clusters(seed=k)
    theirs = KNeighborsClassifier(k).fit(x[:200], labels[:200])
    expected = 100 * theirs.score(x[200:], labels[200:])
    assert euclidean_knn_top1(*halves(x, labels), k=k, block=33) == pytest.approx(expected)
    assert k == 200 or expected != 100 * KNeighborsClassifier(k, metric="cosine").fit(
        x[:200], labels[:200]
    ).score(x[200:], labels[200:])  # the case tells the two apart


def test_more_neighbours_than_images_are_all_of_them():
    x, labels = clusters()
    everything = halves(x, labels)
    assert knn_top1(*everything, k=500) == knn_top1(*everything, k=200)
    assert euclidean_knn_top1(*everything, k=500) == euclidean_knn_top1(*everything, k=200)


def test_a_large_bank_never_becomes_one_matrix():
    """30,000 x 20,000 distances would take 2.4 GB; in blocks it is tens of megabytes."""
    noise = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(20000, 4, generator=noise), torch.randn(30000, 4, generator=noise)
    labels = torch.zeros(30000, dtype=torch.long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert knn_top1(bank, labels[:20000], queries, labels, k=1) == 100
    assert euclidean_knn_top1(bank, labels[:20000], queries, labels) == 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600e3  # kB
