"""Metrics during pretraining, and on which images they are measured."""

from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch

import train_byol
from byol.byol import BYOL
from data.datasets import Dataset
from data.images import Images
from data.loader import Loader
from data.transform import EvalTransform
from data.views import View2Config, ViewConfig
from eval import online as module
from eval.collapse import collapse_metrics
from eval.features import extract
from eval.knn import knn_top1
from eval.online import OnlineEval, held_out_order
from training.distributed import SINGLE, Processes
from training.encoder import Encoder

TRANSFORM = EvalTransform([0.5] * 3, [0.25] * 3)


def images(count=60):
    rng = np.random.default_rng(0)
    return Images([rng.integers(0, 256, (count, 1, 16, 16), np.uint8)]), np.arange(count) % 3


def loader(pictures=None) -> Loader:
    return Loader(images=pictures or images(80)[0], labels=None, crop_size=12, batch_size=8,
                  views=(ViewConfig(), View2Config()), mean=[0.5] * 3, std=[0.25] * 3)  # fmt: skip


def online(every=1, labelled=True, pictures=None, processes=SINGLE, history=()) -> OnlineEval:
    known = images() if labelled else (None, None)
    data = Dataset(*known, None, None, None, list("abc"))
    settings = loader(pictures), TRANSFORM, processes, every, 100, history
    return OnlineEval(data, *settings)


def method() -> BYOL:
    torch.manual_seed(0)
    return BYOL(Encoder("resnet18", "small", 1 / 16), BYOL.Config(hidden=16, projection=8))


def due(watch, index, last=False):
    return watch.due(SimpleNamespace(index=index, last=last))


def test_it_is_due_after_the_first_step_at_the_cadence_and_at_the_end():
    watch = online(3)
    assert [due(watch, k) for k in range(7)] == [True, False, True, False, False, True, False]
    assert due(watch, 6, last=True)
    assert not due(online(0), 0) and not due(online(0), 5, last=True)


def test_queries_are_held_out_of_the_bank():
    pictures, labels = images()
    watch = online()
    assert watch.queries == 12
    everything = np.arange(60)
    rows = [row.numpy().tobytes() for row in watch.images.take(everything)]
    assert len(set(rows)) == 60  # each image once: query or bank
    whole = [row.numpy().tobytes() for row in pictures.take(everything)]
    original = dict(zip(whole, labels, strict=True))
    assert [original[row] for row in rows] == watch.labels.tolist()

    byol = method()
    with torch.no_grad():  # it is the online encoder that is measured
        for parameter in byol.target_encoder.parameters():
            parameter.normal_()
    x = extract(byol.encoder, watch.images, TRANSFORM)
    expected = knn_top1(x[12:], watch.labels[12:], x[:12], watch.labels[:12])
    assert watch.measure(byol, 9)[0]["knn_top1"] == expected
    byol.probe, byol.probed = torch.nn.Linear(byol.encoder.feature_size, 4), True
    right = (byol.probe(x[:12]).argmax(1) == watch.labels[:12]).float().mean().item()
    assert watch.measure(byol, 9)[0]["online_probe_top1"] == pytest.approx(100 * right)


def test_the_probe_never_sees_the_labels_it_is_measured_on():
    pictures, labels = images()
    everything = np.concatenate([labels, np.full(7, -1)])
    data = Dataset(pictures, labels, None, None, None, [])
    seen = train_byol.labels_for(SimpleNamespace(uses_labels=True), data, everything)
    order, queries = held_out_order(len(labels))
    assert queries == online().queries == 12 and (seen[order[:12]] == -1).all()
    assert (seen[order[12:]] == labels[order[12:]]).all() and (seen[60:] == -1).all()
    assert (everything[:60] == labels).all()


OUTPUTS = ("representation", "projection", "target_representation", "target")
NAMES = [f"{metric}/{o}" for metric in ("std", "rank", "uniformity", "alignment") for o in OUTPUTS]


def test_collapse_is_watched_for_online_and_target_with_and_without_labels():
    byol = method().train()
    before = {k: v.clone() for k, v in byol.state_dict().items()}
    found, _ = online().measure(byol, 9)
    assert set(found) == {"knn_top1", *NAMES}
    assert set(online().measure(byol, 0)[0]) == set(NAMES)
    unlabelled = online(labelled=False)
    assert set(unlabelled.measure(byol, 9)[0]) == set(NAMES) and len(unlabelled.images) == 80
    assert byol.training and byol.encoder.training
    after = byol.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())  # running statistics too


def test_without_labels_the_watched_images_come_from_the_whole_set():
    """A folder's images are in the order of their names, so the first ones may all be alike."""
    pictures, _ = images(5000)
    watch = online(labelled=False, pictures=pictures)
    index = watch.images.index[:2048]
    assert len(set(index)) == 2048 and index.min() < 100 and index.max() > 4900


def test_each_warning_is_returned_when_it_comes_also_in_a_resumed_run(monkeypatch):
    start = {"std/representation": 1.0, "rank/representation": 50.0}
    narrow = start | {"std/representation": 0.1}
    rows = iter([narrow, narrow, narrow | {"rank/representation": 1.0}])
    monkeypatch.setattr(module, "collapse_metrics", lambda outputs: dict(next(rows)))
    watch = online(labelled=False, history=[start | {"step": 0}])
    monkeypatch.setattr(watch, "_outputs", lambda _: {"representation": torch.zeros(2, 4, 100)})
    _, (first,) = watch.measure(None, 20)
    assert "representation" in first and watch.measure(None, 25)[1] == []
    _, (second,) = watch.measure(None, 30)
    assert "representation uses 1 of" in second and watch.warnings == [first, second]


def test_metrics_that_are_not_finite_stop_nothing():
    """The loop's own check is what stops the run, and names the step."""
    byol = method()
    with torch.no_grad():
        byol.projector[0].weight.fill_(float("nan"))
    found, _ = online().measure(byol, 0)
    assert np.isnan(found["rank/projection"]) and np.isfinite(found["rank/representation"])


def test_collapse_metrics_are_those_of_the_outputs_in_eval_mode():
    watch, byol = online(), method()
    with torch.no_grad():  # away from its start, so that online and target differ
        for parameter in byol.target_encoder.parameters():
            parameter.mul_(1.3)
    seen = {}
    original = byol.forward
    byol.forward = lambda *views: seen.setdefault("outputs", original(*views))
    found, _ = watch.measure(byol, 0)
    assert seen["outputs"]["representation"].shape[1] == 60
    assert found == collapse_metrics(seen["outputs"])
    assert found["std/representation"] != found["std/target_representation"]
    byol.forward = original
    assert watch.measure(byol, 0)[0] == found  # the same views each time


def test_all_processes_find_the_same_as_one(tmp_path, ranks=2):
    def work(path):
        torch.set_num_threads(1)
        processes = Processes(torch.distributed.get_rank(), ranks, torch.device("cpu"), True)
        watch = online(processes=processes)
        torch.save(watch.measure(method(), 9)[0], f"{path}-{processes.rank}")

    forked.run(work, tmp_path / "metrics", ranks=ranks)
    expected, _ = online().measure(method(), 9)
    for rank in range(ranks):
        found = torch.load(tmp_path / f"metrics-{rank}", weights_only=True)
        assert found == pytest.approx(expected, rel=1e-3)
