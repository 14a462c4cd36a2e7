"""Logistic regression against scikit-learn; folds; the MLP."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from data import datasets
from data.labelled import stratified_folds
from data.transform import EvalTransform
from eval import classifiers as module
from eval.classifiers import (
    STRENGTHS,
    MLPConfig,
    accuracy,
    choose_strength,
    fit_linear,
    fit_mlp,
    logistic_regression,
    mean_and_std,
    row_span,
    scores,
)
from eval.features import extract
from training.encoder import Encoder


def problem(count, size, classes=4, spread=1.5, seed=0):
    """Clusters with unequal scales and offsets: (features float32, labels)."""
    rng = np.random.default_rng(seed)
    centres = spread * rng.normal(size=(classes, size)) / size**0.5
    labels = np.arange(count) % classes
    x = centres[labels] + rng.normal(size=(count, size)) / size**0.5
    x = x * rng.uniform(0.1, 10, size) + rng.normal(size=size)
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


def objective(weight, bias, x, labels, strength) -> float:
    """Mean cross-entropy + strength/2 |W|^2, in numpy."""
    logits = x @ weight + bias
    top = logits.max(1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    loss = np.mean(log_sum - logits[np.arange(len(labels)), labels])
    return loss + strength / 2 * np.sum(weight**2)


@pytest.mark.parametrize("strength", [10.0, 0.1, 1e-3])
@pytest.mark.parametrize("count, size", [(120, 8), (40, 100)])
def test_logistic_regression_minimises_the_objective_as_scikit_learn_does(count, size, strength):
    features, labels = problem(count, size)
    x = features.double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    # sklearn: C sum(loss) + |W|^2 / 2, so C = 1 / (count strength)
    theirs = LogisticRegression(C=1 / (count * strength), tol=1e-8, max_iter=5000)
    theirs.fit(x, labels.numpy())
    expected = objective(theirs.coef_.T, theirs.intercept_, x, labels.numpy(), strength)

    head = fit_linear(features, labels, 4, strength).head
    weight, bias = head.weight.detach().double().numpy().T, head.bias.detach().double().numpy()
    found = objective(weight, bias, x, labels.numpy(), strength)
    assert found == pytest.approx(expected, rel=1e-3)
    assert found <= expected + 1e-4
    mine = (x @ weight + bias).argmax(1)
    assert np.mean(mine == theirs.predict(x)) > 0.97


def test_on_real_features_it_is_scikit_learns():
    """An untrained network's features of the sample: loss to 1e-3, accuracy to 0.2 points."""
    data = datasets.load(datasets.DataConfig(dataset="sample"))
    torch.manual_seed(0)
    encoder, strength = Encoder("resnet18", "small", 0.25), 0.01
    sets = data.train, data.test.subset(np.arange(2000))
    transform = EvalTransform([0.3] * 3, [0.35] * 3)
    features, test = (extract(encoder, images, transform) for images in sets)
    labels = torch.from_numpy(data.train_labels)
    mine = fit_linear(features, labels, 10, strength)
    x, other = (((f - mine.mean) / mine.std).double().numpy() for f in (features, test))
    theirs = LogisticRegression(C=1 / (len(x) * strength), tol=1e-6, max_iter=5000)
    theirs.fit(x, data.train_labels)

    w, b = mine.head.weight.detach().double().numpy().T, mine.head.bias.detach().double().numpy()
    found = objective(w, b, x, data.train_labels, strength)
    expected = objective(theirs.coef_.T, theirs.intercept_, x, data.train_labels, strength)
    assert found == pytest.approx(expected, abs=1e-3)
    truth = data.test_labels[:2000]
    assert abs(mine.top1(test, truth) - 100 * theirs.score(other, truth)) <= 0.2
    assert 60 < mine.top1(test, truth) < 90


def test_an_edge_of_the_grid_is_said(monkeypatch):
    features, labels = problem(60, 6, spread=0)  # nothing to learn: the strongest wins
    assert fit_linear(features, labels, 4).chosen == "L2 10 (the edge of the grid)"
    assert fit_linear(features, labels, 4, 10).chosen == "L2 10"


def test_the_span_of_the_rows_holds_the_solution():
    """With fewer images than dimensions, the small problem has the solution of the full one."""
    features, labels = problem(30, 60)
    x = features.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    theta = logistic_regression(x, labels, torch.zeros(61, 4).double(), 0.05)
    full, bias = theta[:-1], theta[-1]
    head = fit_linear(features, labels, 4, 0.05).head
    torch.testing.assert_close(head.weight.double().T, full, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(head.bias.double() - head.bias.mean(), bias - bias.mean(),
                               atol=1e-3, rtol=1e-2)  # fmt: skip

    mean, std, basis = row_span(features.double())
    small = (features - mean) / std @ basis
    assert small.shape == (30, 30)
    torch.testing.assert_close(basis.T @ basis, torch.eye(30).double())
    torch.testing.assert_close(small @ small.T, x @ x.T)  # all inner products are kept
    weight = logistic_regression(small, labels, torch.zeros(31, 4).double(), 0.05)[:-1]
    others = (problem(7, 60, seed=5)[0] - mean) / std
    torch.testing.assert_close(others @ basis @ weight, others @ full, atol=1e-3, rtol=1e-2)


def test_the_intercept_is_free():
    labels = torch.tensor([0] * 90 + [1] * 10)
    start = torch.zeros(4, 2).double()
    bias = logistic_regression(torch.randn(100, 3).double(), labels, start, 1e6)[-1]
    assert (bias[0] - bias[1]).item() == pytest.approx(np.log(9), abs=1e-2)


def test_constant_features_do_no_harm():
    features, labels = problem(60, 6)
    features[:, 2] = 3.0
    features[:, 4] = 0.0
    classifier = fit_linear(features, labels, 4, 0.01)
    assert torch.isfinite(classifier(features)).all()
    without = fit_linear(features[:, [0, 1, 3, 5]], labels, 4, 0.01)
    torch.testing.assert_close(
        classifier(features), without(features[:, [0, 1, 3, 5]]), atol=2e-2, rtol=1e-2
    )
    mean, std = mean_and_std(features)
    assert std[2] == 1 and mean[2] == 3


def held_out_losses(features, labels, strengths):
    """Five-fold cross-validated losses by scikit-learn, on the same folds."""
    losses = np.zeros(len(strengths))
    x, y = features.double().numpy(), labels.numpy()
    for rows in stratified_folds(y, 5):
        kept = np.setdiff1d(np.arange(len(y)), rows)
        mean, std = x[kept].mean(0), x[kept].std(0)
        for i, strength in enumerate(strengths):
            model = LogisticRegression(C=1 / (len(kept) * strength), tol=1e-6, max_iter=3000)
            model.fit((x[kept] - mean) / std, y[kept])
            p = model.predict_proba((x[rows] - mean) / std)
            losses[i] -= np.log(p[np.arange(len(rows)), y[rows]]).sum()
    return losses


def test_the_strength_is_the_best_cross_validated_one():
    features, labels = problem(60, 30, spread=0.3)
    strengths = STRENGTHS[::3]
    losses = held_out_losses(features, labels, strengths)
    assert 0 < losses.argmin() < len(strengths) - 1  # the case is not at the edge
    assert choose_strength(features, labels, strengths) == strengths[losses.argmin()]


def test_of_many_images_a_fifth_is_held_out_whatever_the_smallest_class_has(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "stratified_folds", lambda y, n: asked.append(n) or [[0, 1]] * n)
    for images, folds in ((1998, 2), (2002, 5)):
        labels = torch.tensor([0] * (images - 2) + [1] * 2)
        choose_strength(torch.randn(images, 2), labels, (1.0,))
        assert asked.pop() == folds


def test_the_mlp_learns_what_a_line_can_not():
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(600, 2))).float()
    labels = (x[:, 0] * x[:, 1] > 0).long()
    config = MLPConfig(hidden=64, steps=300, dropout=0.0)
    classifier = fit_mlp(x[:400], labels[:400], 2, config, 0)
    assert classifier.top1(x[400:], labels[400:]) > 90
    assert fit_linear(x[:400], labels[:400], 2).top1(x[400:], labels[400:]) < 65


def test_the_mlp_is_a_function_of_its_seed_and_leaves_the_generator_alone():
    features, labels = problem(40, 5)
    config = MLPConfig(hidden=8, steps=5)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, again, other = (fit_mlp(features, labels, 4, config, s)(features) for s in (3, 3, 4))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("classes", [3, 12])  # of twelve, some don't occur among the labels
def test_mean_per_class_is_scikit_learns_balanced_accuracy(classes):
    rng = np.random.default_rng(classes)
    labels = rng.choice(10, 200, p=np.arange(1, 11) / 55) % classes
    logits = torch.from_numpy(rng.normal(size=(200, classes)) + np.eye(classes)[labels])
    guess = logits.argmax(1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # predictions of classes that don't occur
        expected = 100 * balanced_accuracy_score(labels, guess)
    measured = scores(logits, labels)
    assert measured["mean_per_class"] == pytest.approx(expected, abs=1e-4)
    assert measured["top1"] == pytest.approx(100 * np.mean(guess == labels), abs=1e-4)
    assert abs(measured["top1"] - expected) > 0.1


def test_accuracy_is_in_percent():
    logits = torch.tensor([[1.0, 2], [3, 1], [0, 1]])
    assert accuracy(logits, np.array([1, 0, 0])) == pytest.approx(200 / 3)
