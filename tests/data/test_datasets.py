import numpy as np
import pytest

from core.errors import UserError
from data.datasets import DataConfig, Dataset, LabelledData, load, prepare
from data.images import Images
from data.labelled import each_fold, evaluation, label_draw, stratified_folds
from data.transform import EvalTransform

LABELS = np.random.default_rng(5).permutation(np.repeat(np.arange(5), [20, 21, 22, 23, 24]))


def dataset(unlabelled=30, folds=None):
    """Each image is filled with its own number: 0.. train, 100.. unlabelled, 200.. test."""

    def numbered(start, count):
        return Images([np.arange(start, start + count, dtype=np.uint8)[:, None, None, None]])

    train_labels, test_labels = np.repeat(np.arange(5), 8), np.repeat(np.arange(5), 4)
    rest = numbered(100, unlabelled) if unlabelled else None
    return Dataset(
        numbered(0, 40), train_labels, rest, numbered(200, 20), test_labels, list("abcde"), folds
    )


def numbers(images):
    return images.take(np.arange(len(images)))[:, 0, 0, 0].numpy()


@pytest.mark.parametrize("count", [5, 10, 50, 100])
def test_label_draw_is_balanced_sorted_and_without_repeats(count):
    chosen = label_draw(LABELS, count, draw=3)
    assert len(chosen) == count and (np.diff(chosen) > 0).all()
    assert (np.bincount(LABELS[chosen]) == count // 5).all()


def test_all_labels_are_all_of_them_however_unbalanced():
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert label_draw(labels, 0, 3).tolist() == label_draw(labels, 6, 4).tolist() == list(range(6))
    with pytest.raises(UserError, match="at most 3"):
        label_draw(labels, 5, 0)


def test_label_draws_are_nested_in_count():
    sets = [set(label_draw(LABELS, count, draw=1)) for count in (5, 10, 25, 50, 100)]
    assert all(small < large for small, large in zip(sets, sets[1:], strict=False))


def test_label_draws_repeat_and_differ_by_draw():
    draws = [tuple(label_draw(LABELS, 25, draw)) for draw in range(6)]
    assert len(set(draws)) == 6
    assert draws == [tuple(label_draw(LABELS, 25, draw)) for draw in range(6)]


def test_label_draw_reaches_all_images():
    union = set().union(*(label_draw(LABELS, 50, draw) for draw in range(20)))
    assert union == set(range(len(LABELS)))


def test_zero_labels_means_all():
    assert np.array_equal(label_draw(LABELS, 0, 7), np.arange(110))


@pytest.mark.parametrize(
    "count, why", [(7, "multiple of 5"), (105, "at most 100"), (3, "multiple")]
)
def test_label_draw_refuses(count, why):
    with pytest.raises(UserError, match=f"--labels {count}.*{why}"):
        label_draw(LABELS, count, 0)


def test_pretraining_joins_train_and_unlabelled_with_labels_in_step():
    images, labels = dataset().pretraining("train+unlabelled")
    assert np.array_equal(numbers(images), np.r_[0:40, 100:130])
    assert np.array_equal(labels, np.r_[np.repeat(np.arange(5), 8), np.full(30, -1)])


def test_pretraining_on_unlabelled_alone():
    images, labels = dataset().pretraining("unlabelled")
    assert np.array_equal(numbers(images), np.arange(100, 130))
    assert (labels == -1).all()


def test_pretraining_on_unlabelled_images_that_are_missing_is_refused():
    with pytest.raises(UserError, match="--pretrain-on unlabelled"):
        dataset(unlabelled=0).pretraining("unlabelled")
    images, labels = dataset(unlabelled=0).pretraining("train+unlabelled")
    assert len(images) == len(labels) == 40


def test_evaluation_uses_the_draw_and_the_whole_test_set():
    split = evaluation(dataset(), LabelledData(labels=10, draw=2))
    chosen = label_draw(np.repeat(np.arange(5), 8), 10, 2)
    assert np.array_equal(numbers(split.train.images), chosen)
    assert np.array_equal(split.train.labels, chosen // 8)
    assert np.array_equal(numbers(split.test.images), np.arange(200, 220))
    assert np.array_equal(split.test.labels, np.repeat(np.arange(5), 4))


def test_validation_is_the_rest_of_the_train_images_and_never_test():
    split = evaluation(dataset(), LabelledData(labels=15, evaluate_on="validation"))
    used, held = numbers(split.train.images), numbers(split.test.images)
    assert len(used) == 15 and not set(used) & set(held)
    assert sorted([*used, *held]) == list(range(40))
    assert np.array_equal(split.train.labels, used // 8)
    assert np.array_equal(split.test.labels, held // 8)


def test_validation_without_images_left_is_refused():
    with pytest.raises(UserError, match="--evaluate-on validation"):
        evaluation(dataset(), LabelledData(labels=0, evaluate_on="validation"))


def test_a_fold_gives_exactly_its_images():
    folds = [np.array([5, 3, 17]), np.array([0, 39])]
    split = evaluation(dataset(folds=folds), LabelledData(fold=1))
    assert numbers(split.train.images).tolist() == [0, 39]
    assert split.train.labels.tolist() == [0, 4]
    with pytest.raises(UserError, match="--fold 1"):
        evaluation(dataset(), LabelledData(fold=1))


def test_fold_and_labels_exclude_each_other():
    with pytest.raises(UserError, match="--fold 0.*--labels"):
        evaluation(dataset(folds=[np.arange(10)]), LabelledData(fold=0, labels=5))


def test_all_ten_folds():
    assert [d.fold for d in each_fold(LabelledData(), True)] == list(range(10))
    assert each_fold(LabelledData(fold=3), False) == [LabelledData(fold=3)]


def test_folds_are_stratified_disjoint_and_all():
    labels = np.repeat(np.arange(3), [20, 11, 7])
    found = stratified_folds(labels, 5)
    assert sorted(np.concatenate(found)) == list(range(38))
    for rows in found:
        counts = np.bincount(labels[rows], minlength=3)
        assert (counts >= [4, 2, 1]).all() and (counts <= [4, 3, 2]).all()
    other = stratified_folds(labels, 5, seed=1)
    assert any(not np.array_equal(a, b) for a, b in zip(found, other, strict=True))


def test_what_chooses_settings_sees_a_part_of_the_labels_and_no_test_image():
    everything = evaluation(dataset(), LabelledData(labels=25, draw=1))
    part = everything.train.hold_out()
    used, held = numbers(part.train.images), numbers(part.test.images)
    assert (len(used), len(held)) == (20, 5)
    assert sorted([*used, *held]) == sorted(numbers(everything.train.images))
    assert sorted(part.test.labels) == [0, 1, 2, 3, 4]
    assert np.array_equal(part.train.labels, used // 8)
    assert np.array_equal(part.train.index, used) and np.array_equal(part.test.index, held)


def test_test_images_are_never_held_out_to_choose_on():
    with pytest.raises(ValueError, match="test images"):
        evaluation(dataset(), LabelledData(labels=10)).test.hold_out()


def test_one_image_of_a_class_leaves_nothing_to_choose_on():
    with pytest.raises(UserError, match="each class has one"):
        evaluation(dataset(), LabelledData(labels=5)).train.hold_out()


def test_evaluation_without_labels_is_refused():
    images = Images([np.zeros((4, 3, 2, 2), np.uint8)])
    bare = Dataset(None, None, images, None, None, [])
    assert len(bare.pretraining("train+unlabelled")[0]) == 4
    with pytest.raises(UserError, match="no labelled"):
        evaluation(bare, LabelledData())


def test_sample_has_its_sizes_and_is_balanced():
    config = DataConfig(dataset="sample")
    prepare(config)
    sample = load(config)
    assert (len(sample.train), len(sample.unlabelled), len(sample.test)) == (1000, 8000, 4000)
    assert sample.train.shape == (28, 28)
    assert (np.bincount(sample.train_labels) == 100).all()
    assert (np.bincount(sample.test_labels) == 400).all()
    assert sample.train_labels.dtype == np.int64 and len(sample.class_names) == 10
    used = {bytes(image) for image in sample.train.parts[0]}
    assert not used & {bytes(image) for image in sample.test.parts[0]}


@pytest.mark.parametrize(
    "config, store, expected",
    [
        (dict(), 96, (0, 0)),
        (dict(), 28, (96, 96)),  # as the views, which are enlarged
        (dict(crop_size=24), 28, (0, 0)),
        (dict(crop_size=28), 28, (0, 0)),
        (dict(crop_size=128), 160, (146, 128)),
        (dict(crop_size=224), 256, (256, 224)),
        (dict(eval_size=100, crop_size=64), 96, (100, 64)),
    ],
)
def test_the_evaluation_transform_of_a_data_set(config, store, expected):
    transform = EvalTransform.of(DataConfig(**config), (store, store), [0.5] * 3, [0.2] * 3)
    assert (transform.size, transform.crop) == expected and transform.stored == store


def test_evaluation_smaller_than_its_crop_is_refused():
    with pytest.raises(UserError, match="--eval-size 64.*--crop-size 96"):
        EvalTransform.of(DataConfig(eval_size=64), (96, 96), [0.5] * 3, [0.2] * 3)
