import dataclasses

import numpy as np
import pytest
import torch
from kernel_count import count_launches

from core.errors import UserError
from data.images import Images
from data.loader import Loader, generator
from data.views import View2Config, ViewConfig

COUNT, SIZE, BATCH = 48, 12, 16
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8)
STILL = ViewConfig(area=[1.0, 1.0], aspect=[1.0, 1.0], flip_p=0, jitter_p=0, grey_p=0, blur_p=0)


def loader(images=None, rank=0, world_size=1, **changes):
    settings = dict(
        images=images or Images([PIXELS]), labels=np.arange(COUNT), crop_size=SIZE,
        views=(ViewConfig(), View2Config()), batch_size=BATCH, mean=[0.0] * 3, std=[1.0] * 3,
        rank=rank, world_size=world_size,
    )  # fmt: skip
    return Loader(**(settings | changes))


def whole(step, world_size=1, accumulate=1, **changes):
    """The global batch as all ranks see it together: (views, labels)."""
    ranks = [
        list(loader(rank=r, world_size=world_size, accumulate=accumulate, **changes).batches(step))
        for r in range(world_size)
    ]
    assert all(len(batches) == accumulate for batches in ranks)
    in_order = [ranks[r][micro] for micro in range(accumulate) for r in range(world_size)]
    views = [torch.cat([views[v] for views, _ in in_order]) for v in range(len(in_order[0][0]))]
    return views, torch.cat([labels for _, labels in in_order])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_batch_does_not_depend_on_the_processes(world_size, accumulate):
    for step in (0, 4):
        views, labels = whole(step)
        others, other_labels = whole(step, world_size, accumulate)
        assert torch.equal(labels, other_labels)
        for view, other in zip(views, others, strict=True):
            torch.testing.assert_close(view, other, atol=1e-6, rtol=0)


def test_ranks_and_micro_batches_are_contiguous_blocks_of_the_step():
    indices = loader().indices(1)
    for rank in range(2):
        parts = loader(rank=rank, world_size=2, accumulate=2).batches(1)
        for micro, (_, labels) in enumerate(parts):
            first = micro * 8 + rank * 4
            assert labels.tolist() == indices[first : first + 4].tolist()


def test_labels_belong_to_their_images():
    (view,), labels = whole(2, views=(STILL,))
    expected = torch.from_numpy(PIXELS[labels.numpy()]).float() / 255
    torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)


def test_every_image_comes_once_an_epoch_in_a_new_order():
    train = loader()
    assert train.steps_per_epoch == 3
    epochs = [np.concatenate([train.indices(3 * e + k) for k in range(3)]) for e in range(3)]
    for order in epochs:
        assert np.array_equal(np.sort(order), np.arange(COUNT))
        assert not np.array_equal(order, np.arange(COUNT))
    assert len({tuple(order) for order in epochs}) == 3


def test_an_incomplete_last_batch_is_dropped_and_its_images_change():
    train = loader(batch_size=20)
    assert train.steps_per_epoch == 2
    used = [np.concatenate([train.indices(2 * e), train.indices(2 * e + 1)]) for e in range(4)]
    assert all(len(set(order)) == 40 for order in used)
    assert len({tuple(np.sort(order)) for order in used}) == 4


def test_a_resume_at_step_k_equals_running_to_it():
    running = loader()
    for step in range(5):
        expected = list(running.batches(step))
    ((views, labels),) = loader().batches(4)
    assert torch.equal(labels, expected[0][1])
    for got, view in zip(views, expected[0][0], strict=True):
        assert torch.equal(got, view)


def test_steps_may_be_asked_in_any_order():
    train = loader()
    forward = [train.indices(k).tolist() for k in range(7)]
    assert [train.indices(k).tolist() for k in reversed(range(7))] == forward[::-1]


SAME = Images([np.repeat(PIXELS[:1], COUNT, 0)])  # the views can differ by their numbers alone


def test_views_differ_between_views_images_steps_and_seeds():
    seen = [view for seed in (0, 1) for step in (0, 1)
            for view in whole(step, images=SAME, seed=seed)[0]]  # fmt: skip
    images = torch.cat(seen).flatten(1)
    distances = torch.cdist(images, images) + torch.eye(len(images)) * 9
    assert distances.min() > 1e-3  # seed 0, step 1 is not seed 1, step 0 either


def test_order_depends_on_seed_and_epoch_and_not_on_their_sum():
    assert not np.array_equal(loader(seed=0).indices(3), loader(seed=1).indices(0))
    assert not np.array_equal(loader(seed=0).indices(0), loader(seed=1).indices(0))


def test_streams_are_independent():
    drawn = {
        tuple(generator(s, t, k).random(2)) for s in (0, 1, 2) for t in (1, 2) for k in (0, 1, 2)
    }
    assert len(drawn) == 18


def test_the_global_generators_of_torch_and_numpy_play_no_part():
    torch.manual_seed(0)
    np.random.seed(0)
    first, _ = whole(0)
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.get_rng_state()
    again, _ = whole(0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_views_are_normalized_sized_and_without_gradient():
    views = (STILL, dataclasses.replace(STILL, size=20))
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]
    ((first, second), labels), = loader(views=views, mean=mean, std=std).batches(0)  # fmt: skip
    assert first.shape == (BATCH, 3, SIZE, SIZE) and second.shape == (BATCH, 3, 20, 20)
    x = torch.from_numpy(PIXELS[labels.numpy()]).float() / 255
    expected = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    assert not first.requires_grad and first.is_contiguous(memory_format=torch.channels_last)


def test_any_number_of_views_and_no_labels():
    ((views, labels),) = loader(views=(STILL,) * 3, labels=None).batches(0)
    assert len(views) == 3 and labels is None


def test_D8_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=f"--batch-size {COUNT + 1}.*{COUNT} training images"):
        loader(batch_size=COUNT + 1)
    assert loader(batch_size=COUNT).steps_per_epoch == 1


UNSHARED = [(15, 2, 1), (16, 3, 1), (16, 1, 3), (2, 2, 1), (4, 2, 2), (1, 1, 1)]


@pytest.mark.parametrize("batch, world_size, accumulate", UNSHARED)
def test_D8_a_batch_that_cannot_be_shared_out_is_refused(batch, world_size, accumulate):
    with pytest.raises(UserError, match=f"--batch-size {batch}.*{world_size} processes"):
        loader(batch_size=batch, world_size=world_size, accumulate=accumulate)


# Launches on a GPU: eager PyTorch takes about 5 microseconds for each


@pytest.mark.parametrize("accumulate", [1, 2])
def test_views_start_few_kernels_and_few_copies(accumulate):
    images = Images([np.zeros((512, 3, 96, 96), np.uint8)])
    with count_launches() as launches:
        of_gpu = loader(images, crop_size=96, batch_size=256, accumulate=accumulate,
                        labels=np.arange(512), device=torch.device("cuda"))  # fmt: skip
        launches.copies = 0  # of mean and std, once a run
        list(of_gpu.batches(0))
    print("kernels of the views:", launches.kernels.total(), "copies:", launches.copies)
    assert 100 * accumulate < launches.kernels.total() <= 180 * accumulate
    assert launches.copies == 3 * accumulate  # pixels, numbers, labels
    assert not launches.foreach
