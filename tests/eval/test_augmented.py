"""Linear evaluation on random crops against its formula; several rates at once."""

import math

import forked
import numpy as np
import pytest
import torch

import linear_eval
from data.images import Images
from data.labelled import Labelled
from data.loader import Loader
from data.transform import EvalTransform
from data.views import ViewConfig
from eval.augmented import AugmentedConfig, fit_augmented, train_layers
from eval.trained import FrozenEncoder
from training.distributed import SINGLE, Processes
from training.encoder import Encoder

MEAN, STD, CROP, SEED = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3], 12, 3


def labelled(count=45) -> Labelled:
    """Three classes that differ in brightness."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    pixels = rng.integers(0, 100, (count, 3, 16, 16)) + 70 * labels[:, None, None, None]
    return Labelled(Images([pixels.astype(np.uint8)]), labels, 7 + np.arange(count), list("abc"))


def frozen(processes=SINGLE) -> FrozenEncoder:
    torch.manual_seed(0)
    encoder = Encoder("resnet18", "small", 1 / 16).train()
    return FrozenEncoder(encoder, EvalTransform(MEAN, STD), processes)


def by_hand(rate: float, epochs: int, batch: int):
    """Nesterov's momentum (Sutskever et al. 2013, as torch writes it), in float64."""
    data, encoder = labelled(), frozen().encoder.eval()
    loader = Loader(images=data.images, labels=data.labels, crop_size=CROP, batch_size=batch,
                    views=(ViewConfig.supervised([0.08, 1.0], 0, 0.5),), mean=MEAN, std=STD,
                    seed=SEED)  # fmt: skip
    w, b = np.zeros((encoder.feature_size, 3)), np.zeros(3)
    vw, vb = np.zeros_like(w), np.zeros_like(b)
    total = epochs * (45 // batch)
    for k in range(total):
        (((view,), labels),) = loader.batches(k)
        x = encoder(view).detach().double().numpy()
        logits = x @ w + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        error = (p - np.eye(3)[labels.numpy()]) / batch
        gw, gb = x.T @ error, error.sum(0)
        lr = rate * batch / 256 * (1 + math.cos(math.pi * k / total)) / 2
        vw, vb = 0.9 * vw + gw, 0.9 * vb + gb
        w, b = w - lr * (gw + 0.9 * vw), b - lr * (gb + 0.9 * vb)
    return w, b


@pytest.mark.parametrize("rates", [[2.0], [0.1, 2.0, 0.5]])
def test_it_is_the_papers_sgd_whatever_runs_beside(rates):
    config = AugmentedConfig(epochs=5, batch_size=20)
    layers = train_layers(frozen(), labelled(), rates, config, CROP, SEED)
    weight, bias = by_hand(2.0, 5, 20)
    layer = layers[rates.index(2.0)]
    np.testing.assert_allclose(layer.weight.detach().numpy().T, weight, atol=1e-5)
    np.testing.assert_allclose(layer.bias.detach().numpy(), bias, atol=1e-5)
    assert np.abs(weight).max() > 0.01


def test_the_encoder_is_frozen():
    model = frozen()
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    train_layers(model, labelled(), [1.0], AugmentedConfig(epochs=2), CROP, SEED)
    after = model.encoder.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert all(p.grad is None for p in model.encoder.parameters())


def test_the_rate_is_the_best_on_held_out_labels_and_then_all_labels_train(monkeypatch):
    config = AugmentedConfig(epochs=20, batch_size=20, rates=[1e-6, 5.0, 1e3])
    everything, seen = labelled(), []

    def watched(model, data, rates, *rest):
        seen.append((len(data), list(rates)))
        return train_layers(model, data, rates, *rest)

    monkeypatch.setattr("eval.augmented.train_layers", watched)
    classifier = fit_augmented(frozen(), everything, config, CROP, SEED)
    best = max(classifier.trials, key=classifier.trials.get)
    assert list(classifier.trials) == config.rates and classifier.chosen == f"rate {best:g} per 256"
    assert seen == [(36, config.rates), (45, [best])]
    part, x = everything.hold_out(), frozen()(everything.images)
    tried = train_layers(frozen(), part.train, config.rates, config, CROP, SEED)
    for rate, layer in zip(config.rates, tried, strict=True):
        right = layer(frozen()(part.test.images)).argmax(1).numpy() == part.test.labels
        assert classifier.trials[rate] == pytest.approx(100 * right.mean())
    assert len(set(classifier.trials.values())) > 1
    (layer,) = train_layers(frozen(), everything, [best], config, CROP, SEED)
    torch.testing.assert_close(classifier(x), layer(x))
    assert classifier.top1(x, torch.from_numpy(everything.labels)) > 60


def test_area_is_two_values(trained_run, capsys):
    words = ["--ckpt", str(trained_run), "--protocol", "augmented", "--augmented.area", "0.5"]
    with pytest.raises(SystemExit):
        linear_eval.main(words)
    assert "augmented.area = [0.5]: expected two values" in capsys.readouterr().err


def test_one_rate_needs_no_choice():
    config = AugmentedConfig(epochs=1, rates=[0.2])
    few = labelled(3)  # a held-out fifth of one image a class would be refused
    assert fit_augmented(frozen(), few, config, CROP, SEED).trials == {}


def test_two_processes_train_the_same_layer(tmp_path):
    config = AugmentedConfig(epochs=3, batch_size=20)

    def work(path):
        processes = Processes(torch.distributed.get_rank(), 2, torch.device("cpu"), True)
        (layer,) = train_layers(frozen(processes), labelled(), [2.0], config, CROP, SEED)
        torch.save(layer.state_dict(), f"{path}-{processes.rank}")

    forked.run(work, tmp_path / "layer", ranks=2)
    (one,) = train_layers(frozen(), labelled(), [2.0], config, CROP, SEED)
    for rank in range(2):
        found = torch.load(tmp_path / f"layer-{rank}", weights_only=True)
        torch.testing.assert_close(found["weight"], one.weight.detach(), atol=1e-6, rtol=1e-4)
