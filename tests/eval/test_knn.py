"""k-NN against a loop, and what the figure during pretraining is made of."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from byol.networks import Encoder
from data.images import Images
from eval.features import extract
from eval.knn import HeldOut, held_out_order, hold_out_labels, knn_top1
from training.distributed import SINGLE


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


def images(count=60):
    rng = np.random.default_rng(0)
    return Images([rng.integers(0, 256, (count, 1, 8, 8), np.uint8)]), np.arange(count) % 3


def due(knn, index, last=False):
    return knn.due(SimpleNamespace(index=index, last=last))


def test_it_is_due_at_the_cadence_and_the_end_and_never_without_labels():
    how = ([0.5] * 3, [0.25] * 3, (0, 0))
    knn = HeldOut(*images(), 3, how)
    assert [due(knn, k) for k in range(6)] == [False, False, True] * 2
    assert due(knn, 0, last=True)
    assert not due(HeldOut(*images(), 0, how), 0, last=True)
    assert not due(HeldOut(None, None, 3, how), 2, last=True)


def test_queries_are_held_out_of_the_bank():
    pictures, labels = images()
    knn = HeldOut(pictures, labels, 1, ([0.5] * 3, [0.25] * 3, (0, 0)))
    assert knn.queries == 12
    everything = np.arange(60)
    rows = [row.numpy().tobytes() for row in knn.images.gather(everything)]
    assert len(set(rows)) == 60  # each image once: query or bank
    whole = [row.numpy().tobytes() for row in pictures.gather(everything)]
    original = dict(zip(whole, labels, strict=True))
    assert [original[row] for row in rows] == knn.labels.tolist()

    encoder = Encoder("resnet18", "small", 1 / 16).eval()
    x = extract(encoder, knn.images, [0.5] * 3, [0.25] * 3)
    expected = naive(x[12:].numpy(), knn.labels[12:].tolist(), x[:12].numpy(),
                     knn.labels[:12].tolist(), 20, 0.07)  # fmt: skip
    method = SimpleNamespace(encoder=encoder)
    assert knn.figures(method, SINGLE) == {"knn_top1": pytest.approx(expected)}
    method.probe = torch.nn.Linear(encoder.feature_size, 4)
    right = (method.probe(x[:12]).argmax(1) == knn.labels[:12]).float().mean().item()
    assert knn.figures(method, SINGLE)["online_probe_top1"] == pytest.approx(100 * right)


def test_the_probe_never_sees_the_labels_it_is_measured_on():
    pictures, labels = images()
    everything = np.concatenate([labels, np.full(7, -1)])
    seen = hold_out_labels(everything, labels)
    held = HeldOut(pictures, labels, 1, None)
    order, queries = held_out_order(len(labels))
    assert queries == held.queries == 12 and (seen[order[:12]] == -1).all()
    assert (seen[order[12:]] == labels[order[12:]]).all() and (seen[60:] == -1).all()
    assert (everything[:60] == labels).all()
