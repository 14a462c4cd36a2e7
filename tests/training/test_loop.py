"""The step loop, and the seam: methods that the loop has never heard of."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import train_byol
from core.errors import UserError
from data.images import Images
from data.loader import Loader
from data.views import ViewConfig
from eval.probe import OnlineProbe
from training.loop import Precision, seed_step, train_steps
from training.method import Method, option

CPU = torch.device("cpu")


class Flat(nn.Module):
    """An encoder without batch norm."""

    feature_size = 5

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x):
        return torch.tanh(self.linear(x.flatten(1)))


class Toy(Method):
    """The squared difference of two views, and a record of what the loop did."""

    name = "toy"

    def __init__(self, encoder, config=None):
        super().__init__(encoder, config)
        self.progress, self.seen = [], []

    def forward(self, view1, view2):
        return {"representation": torch.stack([self.encoder(view1), self.encoder(view2)])}

    def loss(self, outputs):
        y1, y2 = outputs["representation"]
        self.seen.append((y1.dtype, torch.is_autocast_enabled("cpu"), len(y1)))
        return ((y1 - y2).square().sum(1) - y1.sum(1).sin()).mean(), {}

    def after_step(self, progress):
        self.progress.append(progress)
        return {"tau": progress}


def toy(method_class=Toy) -> Toy:
    torch.manual_seed(0)
    return method_class(Flat())


def loader(accumulate=1, labels=None, **options) -> Loader:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8)
    views = (ViewConfig(), ViewConfig())
    return Loader(Images([pixels]), labels, views, 8, 8, [0.5] * 3, [0.25] * 3,
                  accumulate=accumulate, **options)  # fmt: skip


def sgd(method) -> torch.optim.Optimizer:
    return torch.optim.SGD(method.parameters(), lr=0.0, momentum=0.9)


SETTINGS = dict(peak=0.1, warmup=2, total=6)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_the_large_batch(accumulate):
    results = []
    for parts in (1, accumulate):
        method = toy().double()
        steps = train_steps(method, loader(parts, dtype=torch.float64), sgd(method),
                            Precision("fp32", CPU), **SETTINGS)  # fmt: skip
        losses = [step.loss.item() for step in steps]
        assert [count for _, _, count in method.seen] == [8 // parts] * 6 * parts
        assert len(method.progress) == 6  # once a step, not once a micro-batch
        results.append((losses, method.encoder.linear.weight.detach()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=1e-14)


def test_each_step_has_its_index_epoch_rate_and_progress():
    method = toy()
    steps = list(train_steps(method, loader(), sgd(method), Precision("fp32", CPU), **SETTINGS))
    assert [s.index for s in steps] == list(range(6))
    assert [s.epoch for s in steps] == [0, 0, 0, 0, 0, 1]
    assert [s.last for s in steps] == [False] * 5 + [True]
    assert [s.lr for s in steps[:3]] == pytest.approx([0, 0.05, 0.1])
    assert method.progress == pytest.approx([k / 6 for k in range(6)])
    assert [s.logs["tau"] for s in steps] == method.progress
    assert all(s.applied and s.images == 8 for s in steps)


def test_a_part_of_the_schedule_is_the_same_part():
    whole, parts = toy(), toy()
    list(train_steps(whole, loader(), sgd(whole), Precision("fp32", CPU), **SETTINGS))
    optimizer = sgd(parts)
    for start, stop in ((0, 4), (4, 99)):
        list(train_steps(parts, loader(), optimizer, Precision("fp32", CPU), **SETTINGS,
                         start=start, stop=stop))  # fmt: skip
    assert torch.equal(whole.encoder.linear.weight, parts.encoder.linear.weight)
    assert whole.progress == parts.progress


class Overflow(Toy):
    """Its third step's gradient is too large for float16."""

    def loss(self, outputs):
        loss, logs = super().loss(outputs)
        return loss * (1e38 if len(self.seen) == 3 else 1), logs


def test_N4_a_skipped_step_changes_nothing_but_the_index():
    method, precision = toy(Overflow), Precision("fp16", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=16)  # 65536 overflows at first
    weight, optimizer = method.encoder.linear.weight, sgd(method)

    def state():
        momentum = optimizer.state[weight].get("momentum_buffer", torch.zeros(1))
        return weight.detach().clone(), momentum.clone()

    before, scale, rates, applied = state(), 16.0, [], []
    for step in train_steps(method, loader(), optimizer, precision, **SETTINGS):
        after = state()
        if step.applied:
            applied.append(step.index)
            assert not torch.equal(after[1], before[1])
        else:
            assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
            assert "tau" not in step.logs
            scale /= 2
        assert precision.scaler.get_scale() == scale
        before = after
        rates.append(step.lr)
    assert applied == [0, 1, 3, 4, 5]
    # the schedules go on as if the step had counted
    assert method.progress == pytest.approx([k / 6 for k in applied])
    assert len(rates) == 6
    assert rates[3] == pytest.approx(0.1 * 0.5 * (1 + np.cos(np.pi / 4)))


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_the_loss_is_in_float32_outside_autocast(name):
    method = toy()
    list(train_steps(method, loader(), sgd(method), Precision(name, CPU), **SETTINGS))
    assert {(dtype, autocast) for dtype, autocast, _ in method.seen} == {(torch.float32, False)}


def test_the_forward_pass_is_in_the_precision_that_was_asked_for():
    kinds = []
    method = toy()
    method.encoder.linear.register_forward_hook(lambda m, args, y: kinds.append(y.dtype))
    list(train_steps(method, loader(), sgd(method), Precision("bf16", CPU), **SETTINGS))
    assert set(kinds) == {torch.bfloat16}
    assert method.encoder.linear.weight.dtype == torch.float32


def test_a_methods_own_randomness_depends_on_seed_step_and_rank():
    def draw(*where):
        seed_step(*where)
        return torch.rand(()).item()

    places = [(s, k, r) for s in range(3) for k in range(3) for r in range(3)]
    assert len({draw(*place) for place in places}) == 27
    assert draw(1, 2, 0) == draw(1, 2, 0)


def test_labels_go_to_methods_that_use_them():
    labels = np.arange(40) % 4
    labels[:25] = -1
    method = OnlineProbe(toy(), 4)
    data, seen = loader(labels=labels), []
    inner = method.loss
    method.loss = lambda outputs, y: seen.append(y) or inner(outputs, y)
    steps = list(train_steps(method, data, sgd(method), Precision("fp32", CPU), **SETTINGS))
    assert seen[0].tolist() == labels[data.indices(0)].tolist()
    assert all(torch.isfinite(s.loss) for s in steps) and "tau" in steps[-1].logs


def test_the_probe_learns_from_known_labels_and_never_moves_the_encoder():
    method = OnlineProbe(toy(), 4)
    outputs = method(*torch.randn(2, 3, 3, 8, 8))
    labels = torch.tensor([2, -1, 0])
    loss, logs = method.loss(outputs, labels)
    own, _ = method.method.loss(outputs)
    expected = 0.0
    for logits in outputs["probe"]:
        for row, label in ((0, 2), (2, 0)):
            p = logits[row].double().softmax(0)[label]
            expected -= p.log() / 4  # two views of two labelled images
    assert (loss - own).item() == pytest.approx(expected.item(), rel=1e-4)
    assert logs["probe_loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    (loss - own).backward()
    grad = method.encoder.linear.weight.grad
    assert grad is None or grad.abs().max() < 1e-6
    assert method.probe.weight.grad.abs().max() > 0


def test_what_a_loss_logs_is_the_mean_of_the_micro_batches():
    method, data, number = toy(), loader(accumulate=2), np.float32(3)
    inner = method.loss
    method.loss = lambda outputs: (loss := inner(outputs)[0], {"same": loss, "number": number})
    for step in train_steps(method, data, sgd(method), Precision("fp32", CPU), **SETTINGS):
        assert step.logs["same"].item() == pytest.approx(step.loss.item())
        assert not step.logs["same"].requires_grad
        # a tensor on the CPU could not be logged together with the loss of a GPU
        assert step.logs["number"] == 3 and type(step.logs["number"]) is float


def test_a_probe_needs_a_representation():
    method = OnlineProbe(toy(), 4)
    method.method.forward = lambda *views: {"p": views[0]}
    with pytest.raises(UserError, match="no output named representation"):
        method(*torch.randn(2, 3, 3, 8, 8))


def test_the_probe_with_no_known_label_is_finite():
    method = OnlineProbe(toy(), 4)
    loss, logs = method.loss(method(*torch.randn(2, 3, 3, 8, 8)), torch.full((3,), -1))
    assert torch.isfinite(loss) and logs["probe_loss"] == 0


class ThreeViews(Method):
    """Two large views and a small one; nothing in the loop or the loader knows of it."""

    name = "threeviews"
    defaults = {"optim": {"optimizer": "sgd", "lr": 0.05}}
    views = (ViewConfig(size=16), ViewConfig(size=12, blur_p=0.0), ViewConfig(size=8))
    sides = []

    @dataclass
    class Config:
        """[threeviews]: a weight."""

        weight: float = option(0.5, "of the small view", low=0)

    def forward(self, large, middle, small):
        views = (large, middle, small)
        self.sides.append([view.shape[-1] for view in views])
        return {"representation": torch.stack([self.encoder(view) for view in views])}

    def loss(self, outputs):
        a, b, c = outputs["representation"]
        pull = (a - b).square().sum(1).mean()
        return pull + self.config.weight * (a - c).square().sum(1).mean(), {"pull": pull.detach()}


def test_a_method_with_three_views_of_three_sizes_trains(sample, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--recipe", recipe, "--out", str(out), "--threeviews.weight", "0.25"]
    result = train_byol.main(ThreeViews, flags)
    assert result["name"] == "threeviews" and result["steps"] == 10
    assert ThreeViews.sides == [[16, 12, 8]] * 10
    assert (out / "encoder.pt").exists()
    assert '"pull"' in (out / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit):  # they would do nothing
        train_byol.main(ThreeViews, ["--recipe", recipe, "--out", "no", "--view2.size", "8"])
    assert "--view2.size: threeviews has views" in capsys.readouterr().err


def test_a_probed_run_never_shows_the_probe_what_it_is_measured_on(
    sample, recipe, tmp_path, monkeypatch
):
    seen, inner = [], OnlineProbe.loss

    def loss(self, outputs, labels):
        seen.append(int((labels >= 0).sum()))
        return inner(self, outputs, labels)

    monkeypatch.setattr(OnlineProbe, "loss", loss)
    flags = ["--recipe", recipe, "--out", str(tmp_path / "run"), "--online-probe", "--quiet"]
    result = train_byol.main(argv=[*flags, "--steps", "5", "--knn-every", "5"])
    assert sum(seen) == 80  # one epoch of 320 images: 100 labelled, a fifth of them held out
    assert 0 <= result["online_probe_top1"] <= 100


class Supervised(Method):
    """A method that uses labels, in pretraining."""

    name = "supervised"
    defaults = {"optim": {"optimizer": "sgd", "lr": 0.05}}
    uses_labels = True
    seen = []

    @dataclass
    class Config:
        """[supervised]: nothing."""

    def forward(self, *views):
        return {"representation": torch.stack([self.encoder(view) for view in views])}

    def loss(self, outputs, labels):
        self.seen.append(int((labels >= 0).sum()))
        return outputs["representation"][:, labels >= 0].square().mean(), {}


@pytest.mark.parametrize("more", [[], ["--online-probe"]])
@pytest.mark.parametrize("knn_every", ["5", "0"])  # which does not change the training
def test_a_method_with_labels_never_sees_those_that_knn_holds_out(
    sample, recipe, tmp_path, more, knn_every
):
    Supervised.seen.clear()
    flags = ["--recipe", recipe, "--out", str(tmp_path / "run"), "--steps", "5", "--quiet", *more]
    train_byol.main(Supervised, [*flags, "--knn-every", knn_every])
    assert sum(Supervised.seen) == 80
    with pytest.raises(SystemExit):
        train_byol.main(Supervised, [*flags[:2], "--pretrain-on", "unlabelled", "--out", "no"])
