"""What is watched during pretraining, and on which images."""

from types import SimpleNamespace

import forked
import numpy as np
import pytest
import torch

from byol.byol import BYOL
from byol.networks import Encoder
from data.images import Images
from data.loader import Loader
from data.views import View2Config, ViewConfig
from eval.collapse import collapse_figures
from eval.features import extract
from eval.held_out import HeldOut, held_out_order, hold_out_labels
from eval.knn import knn_top1
from training.distributed import SINGLE, Processes


def images(count=60):
    rng = np.random.default_rng(0)
    return Images([rng.integers(0, 256, (count, 1, 16, 16), np.uint8)]), np.arange(count) % 3


def loader(pictures=None, processes=SINGLE) -> Loader:
    return Loader(images=pictures or images(80)[0], labels=None, crop_size=12, batch_size=8,
                  views=(ViewConfig(), View2Config()), mean=[0.5] * 3, std=[0.25] * 3,
                  processes=processes)  # fmt: skip


def held_out(every=1, labelled=True, **options) -> HeldOut:
    known = images() if labelled else (None, None)
    return HeldOut(*known, every, loader(**options), (0, 0))


def method() -> BYOL:
    torch.manual_seed(0)
    return BYOL(Encoder("resnet18", "small", 1 / 16), BYOL.Config(hidden=16, projection=8))


def due(watch, index, last=False):
    return watch.due(SimpleNamespace(index=index, last=last))


def test_it_is_due_after_the_first_step_at_the_cadence_and_at_the_end():
    watch = held_out(3)
    assert [due(watch, k) for k in range(7)] == [True, False, True, False, False, True, False]
    assert due(watch, 6, last=True)
    assert not due(held_out(0), 0) and not due(held_out(0), 5, last=True)


def test_queries_are_held_out_of_the_bank():
    pictures, labels = images()
    watch = held_out()
    assert watch.queries == 12
    everything = np.arange(60)
    rows = [row.numpy().tobytes() for row in watch.images.gather(everything)]
    assert len(set(rows)) == 60  # each image once: query or bank
    whole = [row.numpy().tobytes() for row in pictures.gather(everything)]
    original = dict(zip(whole, labels, strict=True))
    assert [original[row] for row in rows] == watch.labels.tolist()

    byol = method()
    with torch.no_grad():  # it is the online encoder that is measured
        for parameter in byol.target_encoder.parameters():
            parameter.normal_()
    x = extract(byol.encoder, watch.images, [0.5] * 3, [0.25] * 3)
    expected = knn_top1(x[12:], watch.labels[12:], x[:12], watch.labels[:12])
    assert watch.figures(byol, SINGLE, 9)["knn_top1"] == expected
    byol.probe = torch.nn.Linear(byol.encoder.feature_size, 4)
    right = (byol.probe(x[:12]).argmax(1) == watch.labels[:12]).float().mean().item()
    assert watch.figures(byol, SINGLE, 9)["online_probe_top1"] == pytest.approx(100 * right)


def test_the_probe_never_sees_the_labels_it_is_measured_on():
    pictures, labels = images()
    everything = np.concatenate([labels, np.full(7, -1)])
    seen = hold_out_labels(everything, labels)
    order, queries = held_out_order(len(labels))
    assert queries == held_out().queries == 12 and (seen[order[:12]] == -1).all()
    assert (seen[order[12:]] == labels[order[12:]]).all() and (seen[60:] == -1).all()
    assert (everything[:60] == labels).all()


OUTPUTS = ("representation", "projection", "target_representation", "target")
NAMES = [f"{figure}/{o}" for figure in ("std", "rank", "uniformity", "alignment") for o in OUTPUTS]


def test_collapse_is_watched_for_online_and_target_with_and_without_labels():
    byol = method().train()
    before = {k: v.clone() for k, v in byol.state_dict().items()}
    found = held_out().figures(byol, SINGLE, 9)
    assert set(found) == {"knn_top1", *NAMES}
    assert set(held_out().figures(byol, SINGLE, 0)) == set(NAMES)
    unlabelled = held_out(labelled=False)
    assert set(unlabelled.figures(byol, SINGLE, 9)) == set(NAMES) and len(unlabelled.watched) == 80
    assert byol.training and byol.encoder.training
    after = byol.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())  # running statistics too


def test_without_labels_the_watched_images_come_from_the_whole_set():
    """A folder is stored in the order of its names: the first ones may all be alike."""
    pictures, _ = images(5000)
    watch = HeldOut(None, None, 1, loader(pictures), (0, 0))
    index = watch.watched.index
    assert len(set(index)) == 2048 and index.min() < 100 and index.max() > 4900


def test_alarms_come_in_the_order_of_time_each_once():
    """The script prints what is new: the ones after those it has told already."""
    watch = held_out()
    watch.dimensions = {"representation": 100, "projection": 100}
    row = {f"{k}/{n}": 50.0 for k in ("std", "rank") for n in watch.dimensions}
    watch.history = [row | {"step": 0}, row | {"step": 20, "std/projection": 1.0}]
    (first,) = watch.alarms(100)
    watch.history.append(watch.history[1] | {"step": 30, "rank/representation": 1.0})
    again, second = watch.alarms(100)
    assert again == first and "projection" in first and "representation uses 1 of" in second


def test_figures_that_are_not_finite_stop_nothing():
    """The loop's own check says what happened and at which step."""
    byol = method()
    with torch.no_grad():
        byol.projector[0].weight.fill_(float("nan"))
    found = held_out().figures(byol, SINGLE, 0)
    assert np.isnan(found["rank/projection"]) and np.isfinite(found["rank/representation"])


def test_collapse_figures_are_those_of_the_outputs_in_eval_mode():
    watch, byol = held_out(), method()
    with torch.no_grad():  # away from its start, so that online and target differ
        for parameter in byol.target_encoder.parameters():
            parameter.mul_(1.3)
    seen = {}
    original = byol.forward
    byol.forward = lambda *views: seen.setdefault("outputs", original(*views))
    found = watch.figures(byol, SINGLE, 0)
    assert seen["outputs"]["representation"].shape[1] == 60
    assert found == collapse_figures(seen["outputs"])
    assert found["std/representation"] != found["std/target_representation"]
    byol.forward = original
    assert watch.figures(byol, SINGLE, 0) == found  # the same views each time


def test_all_processes_find_the_same_as_one(tmp_path, ranks=2):
    def work(path):
        torch.set_num_threads(1)
        processes = Processes(torch.distributed.get_rank(), ranks, torch.device("cpu"), True)
        watch = HeldOut(*images(), 1, loader(), (0, 0))
        torch.save(watch.figures(method(), processes, 9), f"{path}-{processes.rank}")

    forked.run(work, tmp_path / "figures", ranks=ranks)
    expected = held_out().figures(method(), SINGLE, 9)
    for rank in range(ranks):
        found = torch.load(tmp_path / f"figures-{rank}", weights_only=True)
        assert found == pytest.approx(expected, rel=1e-3)
