import numpy as np
import pytest
import torch

from data.images import Images

CPU = torch.device("cpu")


def pixels(count, channels=3, height=4, width=6, start=0):
    """Every byte differs between neighbours, rows, columns and images."""
    size = count * channels * height * width
    flat = (np.arange(start, start + size) * 7) % 251
    return flat.astype(np.uint8).reshape(count, channels, height, width)


def test_take_returns_the_asked_images_in_the_asked_order():
    array = pixels(5)
    got = Images([array]).take(np.array([3, 0, 3]))
    assert got.dtype == torch.uint8
    assert np.array_equal(got.numpy(), np.stack([array[3], array[0], array[3]]))


def test_take_crosses_parts_in_any_order():
    first, second, third = pixels(3), pixels(2, start=1000), pixels(4, start=5000)
    images, whole = Images([first, second, third]), np.concatenate([first, second, third])
    order = np.array([8, 2, 3, 0, 4, 5, 3])
    assert len(images) == 9
    assert np.array_equal(images.take(order).numpy(), whole[order])


@pytest.mark.parametrize("parts", [1, 2])
def test_column_major_files_are_turned_upright(parts):
    upright = pixels(4, height=4, width=6)
    stored = np.ascontiguousarray(upright.transpose(0, 1, 3, 2))
    images = Images([part.transpose(0, 1, 3, 2) for part in np.split(stored, parts)])
    assert images.shape == (4, 6)
    got = images.take(np.arange(4))
    assert np.array_equal(got.numpy(), upright) and got.stride()[2:] == (1, 4)  # not rearranged


def test_gray_images_get_three_equal_channels():
    array = pixels(3, channels=1)
    got = Images([array]).take(np.array([2, 1]))
    assert got.shape == (2, 3, 4, 6)
    for channel in range(3):
        assert np.array_equal(got[:, channel].numpy(), array[[2, 1], 0])


def test_subsets_of_subsets_index_the_original():
    array = pixels(8)
    images = Images([array[:5], array[5:]]).subset(np.array([7, 1, 4, 6]))
    again = images.subset(np.array([3, 0]))
    assert len(images) == 4 and len(again) == 2
    assert np.array_equal(again.take(np.array([0, 1, 0])).numpy(), array[[6, 7, 6]])


def test_take_reads_memory_maps_and_leaves_them_alone(tmp_path):
    array = pixels(4)
    np.save(tmp_path / "pack.npy", array)
    images = Images([np.load(tmp_path / "pack.npy", mmap_mode="r")])
    images.take(np.array([1, 2])).zero_()
    assert np.array_equal(images.take(np.array([1, 2])).numpy(), array[1:3])


def test_statistics_are_those_of_each_channel():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (50, 3, 4, 6), dtype=np.uint8)
    array[:, 1] //= 2
    array[:, 2] = 255
    mean, std = Images([array]).statistics()
    reference = array.astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert np.allclose(mean, reference.mean(1), atol=1e-12)
    assert np.allclose(std[:2], reference.std(1)[:2], atol=1e-12)
    assert std[2] == 1e-3  # a constant channel must not divide by zero


def test_statistics_sample_the_whole_range():
    array = np.concatenate([np.zeros((500, 3, 2, 2)), np.full((500, 3, 2, 2), 255)])
    mean, _ = Images([array.astype(np.uint8)]).statistics(most=10)
    assert mean == pytest.approx([0.5] * 3)


def test_resident_images_are_the_same_images():
    """Of two parts, column-major, a subset of them: gathered from one tensor in memory."""
    stored = np.ascontiguousarray(pixels(7, channels=1).transpose(0, 1, 3, 2))
    upright = stored.transpose(0, 1, 3, 2)
    images = Images([upright[:3], upright[3:]]).subset(np.array([6, 0, 2, 4, 5]))
    resident = images.resident(CPU, "always", block=2)
    assert isinstance(resident.parts[0], torch.Tensor) and len(resident) == 5
    assert resident.shape == images.shape and resident.gray
    order = np.array([4, 0, 3, 3])
    assert torch.equal(resident.take(order), images.take(order))
    assert torch.equal(
        resident.subset(order).take(order[1:3]), images.subset(order).take(order[1:3])
    )
    assert resident.statistics() == images.statistics()


@pytest.mark.parametrize("when", ["never", "auto"])
def test_a_cpu_leaves_images_where_they_are(when):
    images = Images([pixels(3)])
    assert images.resident(CPU, when) is images


@pytest.mark.parametrize("free, moved", [(2 * 216, False), (2 * 216 + 1, True)])
def test_a_gpu_takes_them_where_they_need_less_than_half_of_its_free_memory(
    monkeypatch, free, moved
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    images = Images([pixels(3)])  # 3 x 3 x 4 x 6 bytes
    monkeypatch.setattr("data.images.to_device", lambda array, device: torch.from_numpy(array))
    monkeypatch.setattr(
        torch, "empty", lambda shape, dtype, device: torch.zeros(shape, dtype=dtype)
    )
    assert (images.resident(torch.device("cuda", 0), "auto") is not images) == moved
