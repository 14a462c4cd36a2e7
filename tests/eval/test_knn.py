"""Nearest neighbors against scikit-learn's."""

import resource

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from eval.knn import knn, knn_top1


def clusters(count=300, size=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, count)
    x = rng.normal(size=(5, size))[labels] + rng.normal(size=(count, size))
    return x * rng.uniform(0.5, 2, (count, 1)), labels


def halves(x, labels):
    t = torch.from_numpy(x).float(), torch.from_numpy(labels)
    return t[0][:200], t[1][:200], t[0][200:], t[1][200:]


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 1.0), (200, 0.07)])
def test_cosine_is_scikit_learns(k, temperature):
    x, labels = clusters()
    votes = dict(metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    theirs = KNeighborsClassifier(k, **votes).fit(x[:200], labels[:200])
    found = knn_top1(*halves(x, labels), k=k, temperature=temperature, block=33)
    assert found == pytest.approx(100 * theirs.score(x[200:], labels[200:]))
    guess = knn(*halves(x, labels)[:3], k=k, temperature=temperature, block=33).argmax(1)
    assert np.array_equal(guess, theirs.predict(x[200:]))


def test_a_class_that_no_neighbor_has_is_a_mistake():
    x, labels = clusters()
    bank, bank_labels, queries, truth = halves(x, labels)
    few = bank_labels < 3
    assert knn(bank[few], bank_labels[few], queries).shape == (100, 3)
    found = knn_top1(bank[few], bank_labels[few], queries, truth)
    assert 0 < found <= 100 * float((truth < 3).float().mean())


@pytest.mark.parametrize("k", [1, 5, 200])
def test_euclidean_is_scikit_learns(k):
    x, labels = clusters(seed=k)
    theirs = KNeighborsClassifier(k).fit(x[:200], labels[:200])
    expected = 100 * theirs.score(x[200:], labels[200:])
    found = knn_top1(*halves(x, labels), k=k, euclidean=True, block=33)
    assert found == pytest.approx(expected)
    assert k == 200 or expected != 100 * KNeighborsClassifier(k, metric="cosine").fit(
        x[:200], labels[:200]
    ).score(x[200:], labels[200:])  # the case tells the two apart


def test_more_neighbours_than_images_are_all_of_them():
    x, labels = clusters()
    everything = halves(x, labels)
    for euclidean in (False, True):
        few, many = (knn_top1(*everything, k=k, euclidean=euclidean) for k in (200, 500))
        assert few == many


def test_a_large_bank_never_becomes_one_matrix():
    """30,000 x 20,000 distances would take 2.4 GB; in blocks it is tens of megabytes."""
    noise = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(20000, 4, generator=noise), torch.randn(30000, 4, generator=noise)
    labels = torch.zeros(30000, dtype=torch.long)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert knn_top1(bank, labels[:20000], queries, labels, k=1) == 100
    assert knn_top1(bank, labels[:20000], queries, labels, k=5, euclidean=True) == 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600e3  # kB
