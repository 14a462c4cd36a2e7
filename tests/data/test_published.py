"""Each set in its published format, tiny, against torchvision's own reading of it."""

import functools
import hashlib
import http.server
import json
import pickle
import sys
import tarfile
import threading
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torchvision.datasets as tv
from folders import picture, save
from torchvision.datasets import cifar, flowers102, svhn

from core.errors import UserError, warn_once
from data import datasets, decode, folder, published
from data.datasets import DataConfig

SIZE = 32  # side of the images that are packed


def random(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def latin(batch) -> bytes:
    """A pickle whose strings are Python 2's: BINSTRING, which Python 3 decodes as it is told."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    def item(value):
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        return pickle.dumps(value, 2)[2:-1]  # without its frame

    body = b"".join(text(key) + item(value) for key, value in batch.items())
    return b"\x80\x02}(" + body + b"u."


def cifar_files(root, place, files, key, names):
    """As Python 2 wrote the published files: byte strings, and more than is used."""
    (root / place).mkdir(parents=True)
    for seed, (name, count) in enumerate(files.items()):
        labels = [(seed + n) % 10 for n in range(count)]
        batch = {b"data": random(count, 3072, seed=seed), key: labels, b"batch_label": b"batch"}
        batch[b"filenames"] = [b"x_%d.png" % n for n in range(count)]
        (root / place / name).write_bytes(latin(batch))
    field = "label_names" if key == b"labels" else "fine_label_names"
    meta = {field: [f"class{n}" for n in range(10)]}
    (root / place / names).write_bytes(pickle.dumps(meta, 2))


def cifar10(root):
    files = {f"data_batch_{n}": 3 for n in range(1, 6)} | {"test_batch": 4}
    cifar_files(root, "cifar-10-batches-py", files, b"labels", "batches.meta")


def cifar100(root):
    cifar_files(root, "cifar-100-python", {"train": 12, "test": 5}, b"fine_labels", "meta")


def mnist(root, name="MNIST"):
    """The IDX format: two zeros, the type, the number of axes, their lengths, the values."""
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 7), ("t10k", 4)):
        for kind, values in (
            ("images-idx3", random(count, 28, 28, seed=count)),
            ("labels-idx1", np.arange(count, dtype=np.uint8) % 10),
        ):
            head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
            (raw / f"{split}-{kind}-ubyte").write_bytes(head + values.tobytes())


def matlab(path, **values):
    pytest.importorskip("scipy.io").savemat(path, values)


def svhn_files(root):
    root.mkdir(exist_ok=True)
    for split, labels in (("train", [10, 1, 2, 10, 9]), ("test", [3, 10])):
        pixels = random(32, 32, 3, len(labels), seed=len(labels))
        matlab(root / f"{split}_32x32.mat", X=pixels, y=np.array(labels, np.uint8)[:, None])


def jpeg(path, number):
    """Side SIZE, or larger and oblong: the packer does nothing, or resizes and crops."""
    shape = [(SIZE, SIZE), (50, 40), (36, 60)][number % 3]
    save(path, picture(*shape, seed=number))


def imagenette(root):
    for n, name in enumerate(["n01440764", "n02102040", "n03888257"]):
        for split, count in (("train", 3), ("val", 2)):
            for i in range(count):
                jpeg(root / "imagenette2" / split / name / f"{name}_{i}.JPEG", 10 * n + i)


def flowers(root):
    """Images of three parts, in an order that is neither that of numbers nor of classes."""
    place = root / "flowers-102"
    for number in range(1, 10):
        jpeg(place / "jpg" / f"image_{number:05d}.jpg", number)
    matlab(place / "imagelabels.mat", labels=np.array([[77, 1, 2, 2, 102, 1, 77, 2, 1]]))
    matlab(place / "setid.mat", trnid=[[4, 1, 6]], valid=[[2, 5]], tstid=[[9, 3, 7, 8]])


def pets(root):
    place, number = root / "oxford-iiit-pet", 0
    (place / "annotations").mkdir(parents=True)
    for split, count in (("trainval", 3), ("test", 2)):
        lines = []
        for label, breed in enumerate(["Abyssinian", "american_bulldog", "Bengal"], 1):
            for i in range(count):
                lines.append(f"{breed}_{split}{i} {label} {1 + label % 2} 1\n")
                jpeg(place / "images" / f"{breed}_{split}{i}.jpg", number := number + 1)
        (place / "annotations" / f"{split}.txt").write_text("".join(lines[::-1]))


def food(root):
    place, number = root / "food-101", 0
    (place / "meta").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        files = {}
        for name in ("waffles", "apple_pie"):  # not in the order of the classes
            files[name] = [f"{name}/{split}{i}" for i in range(count)]
            for file in files[name]:
                jpeg(place / "images" / f"{file}.jpg", number := number + 1)
        (place / "meta" / f"{split}.json").write_text(json.dumps(files))


def dtd(root):
    place, number = root / "dtd" / "dtd", 0
    (place / "labels").mkdir(parents=True)
    for split, count in (("train", 2), ("val", 3), ("test", 2)):
        files = [f"{c}/{c}_{split}{i}.jpg" for c in ("zigzagged", "banded") for i in range(count)]
        (place / "labels" / f"{split}1.txt").write_text("\n".join(files))
        for file in files:
            jpeg(place / "images" / file, number := number + 1)


def aircraft(root):
    place, number = root / "fgvc-aircraft-2013b" / "data", 0
    place.mkdir(parents=True)
    (place / "variants.txt").write_text("707-320\nF/A-18\nA320\n")
    for split, count in (("trainval", 3), ("test", 2)):
        lines = []
        for name in ["A320", "F/A-18", "707-320"] * count:
            jpeg(place / "images" / f"{(number := number + 1):07d}.jpg", number)
            lines.append(f"{number:07d} {name}\n")
        (place / f"images_variant_{split}.txt").write_text("".join(lines))


# name -> writer, torchvision's parts of train, of test; written down here once more
WRITERS = {
    "cifar10": (cifar10, [tv.CIFAR10, True], [tv.CIFAR10, False]),
    "cifar100": (cifar100, [tv.CIFAR100, True], [tv.CIFAR100, False]),
    "mnist": (mnist, [tv.MNIST, True], [tv.MNIST, False]),
    "fashion_mnist": (
        functools.partial(mnist, name="FashionMNIST"),
        [tv.FashionMNIST, True],
        [tv.FashionMNIST, False],
    ),
    "kmnist": (functools.partial(mnist, name="KMNIST"), [tv.KMNIST, True], [tv.KMNIST, False]),
    "svhn": (svhn_files, [tv.SVHN, "train"], [tv.SVHN, "test"]),
    "imagenette": (imagenette, [tv.Imagenette, "train"], [tv.Imagenette, "val"]),
    "flowers102": (flowers, [tv.Flowers102, "train", "val"], [tv.Flowers102, "test"]),
    "oxford_iiit_pet": (pets, [tv.OxfordIIITPet, "trainval"], [tv.OxfordIIITPet, "test"]),
    "food101": (food, [tv.Food101, "train"], [tv.Food101, "test"]),
    "dtd": (dtd, [tv.DTD, "train", "val"], [tv.DTD, "test"]),
    "fgvc_aircraft": (aircraft, [tv.FGVCAircraft, "trainval"], [tv.FGVCAircraft, "test"]),
}
PACKED = list(published.FILES)


def config(root, name, **changes):
    return DataConfig(dataset=name, data_root=str(root), store_size=SIZE, **changes)


def read(root, name, **changes):
    """The data set as a new process loads it."""
    warn_once.cache_clear()
    folder._prepared.clear()
    datasets.prepare(config(root, name, **changes))
    return datasets.load(config(root, name, **changes))


def refusal(root, name, **changes) -> str:
    with pytest.raises(UserError) as caught:
        read(root, name, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expected(root, parts):
    """[(pixels, label)] as torchvision decodes them, in its order; center squares of side SIZE."""
    kind, *splits = parts
    pairs = [pair for split in splits for pair in kind(root, split)]

    def pixels(image):
        width, height = image.size
        if kind in [row[0] for row in published.FILES.values()]:
            side = min(width, height)
            left, top = (width - side) / 2, (height - side) / 2
            box = (left, top, left + side, top + side)
            image = image.resize((SIZE, SIZE), 3, box)  # 3: bicubic
        array = np.asarray(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    return [(pixels(image), int(label)) for image, label in pairs]


@pytest.fixture(autouse=True)
def any_md5(monkeypatch, tmp_path):
    """torchvision checks the MD5 of some of the published files, which tiny ones don't have."""
    for module in (cifar, svhn, flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).exists())
    monkeypatch.chdir(tmp_path)


def test_every_published_name_is_read_and_tested():
    assert list(published.ARRAYS | published.FILES) == datasets.PUBLISHED == list(WRITERS)


@pytest.mark.parametrize("name", WRITERS)
def test_pixels_and_labels_are_those_that_torchvision_reads(tmp_path, name):
    write, *parts = WRITERS[name]
    write(tmp_path)
    data = read(tmp_path, name)
    pairs = ((data.train, data.train_labels), (data.test, data.test_labels))
    for (images, labels), part in zip(pairs, parts, strict=True):
        wanted = expected(tmp_path, part)
        if name in PACKED:  # class by class
            wanted.sort(key=lambda pair: pair[1])
        assert labels.tolist() == [label for _, label in wanted] and labels.dtype == np.int64
        got = images.take(np.arange(len(images))).numpy()
        assert images.gray == (len(wanted[0][0]) == 1)
        for image, (pixels, _) in zip(got, wanted, strict=True):
            assert np.array_equal(image, np.broadcast_to(pixels, image.shape))
    assert data.unlabelled is None and len(set(labels.tolist())) > 1
    assert max(data.train_labels.max(), labels.max()) < len(data.class_names)


def test_arrays_are_those_of_the_files(tmp_path):
    """Not by torchvision: CIFAR's rows are red, green, blue; SVHN's ten is a zero."""
    cifar10(tmp_path)
    data = read(tmp_path, "cifar10")
    got = data.train.take(np.array([4, 14])).numpy()
    assert np.array_equal(got[0].reshape(-1), random(3, 3072, seed=1)[1])
    assert np.array_equal(got[1].reshape(-1), random(3, 3072, seed=4)[2])
    assert data.train_labels.tolist() == [(seed + n) % 10 for seed in range(5) for n in range(3)]
    svhn_files(tmp_path)
    data = read(tmp_path, "svhn")
    blue = data.test.take(np.array([1])).numpy()[0, 2]
    assert np.array_equal(blue, random(32, 32, 3, 2, seed=2)[:, :, 2, 1])
    assert data.train_labels.tolist() == [0, 1, 2, 0, 9]
    assert data.class_names == list("0123456789")


def test_class_names(tmp_path):
    names = {}
    for name in ("cifar100", "kmnist", "imagenette", "flowers102", "oxford_iiit_pet", "dtd"):
        WRITERS[name][0](tmp_path)
        names[name] = read(tmp_path, name).class_names
    assert names["cifar100"] == [f"class{n}" for n in range(10)]
    assert names["kmnist"][:3] == ["o", "ki", "su"]
    assert names["imagenette"] == ["tench", "English springer", "parachute"]
    assert len(names["flowers102"]) == 102 and names["flowers102"][76] == "passion flower"
    assert names["oxford_iiit_pet"] == ["Abyssinian", "American Bulldog", "Bengal"]
    assert names["dtd"] == ["banded", "zigzagged"]


def test_files_are_named_in_the_order_of_the_images(tmp_path):
    dtd(tmp_path)
    files = read(tmp_path, "dtd").files["train"]
    of_class = ["train0", "train1", "val0", "val1", "val2"]
    names = [f"dtd/images/{c}/{c}_{i}.jpg" for c in ("banded", "zigzagged") for i in of_class]
    assert files == names


@pytest.mark.parametrize("name", PACKED)
def test_files_are_decoded_once(tmp_path, name, monkeypatch, capsys):
    WRITERS[name][0](tmp_path)
    first = read(tmp_path, name)
    assert "packed" in capsys.readouterr().out
    monkeypatch.setattr(decode, "decode", lambda *a: pytest.fail("decoded again"))
    again = read(tmp_path, name)
    assert np.array_equal(first.train.parts[0], again.train.parts[0])
    assert again.files == first.files
    (pack,) = tmp_path.glob("*/.byol-pack")
    assert pack.parent.name == published.FILES[name][1][0]


def test_loading_packs_what_was_not_prepared(tmp_path):
    """As eval.report does."""
    dtd(tmp_path)
    data = datasets.load(config(tmp_path, "dtd"))
    assert (len(data.train), len(data.test), data.unlabelled) == (10, 4, None)


def test_a_changed_file_or_list_is_packed_again(tmp_path, capsys):
    dtd(tmp_path)
    read(tmp_path, "dtd")
    jpeg(tmp_path / "dtd/dtd/images/banded/banded_val0.jpg", 99)
    before = read(tmp_path, "dtd")
    labels = tmp_path / "dtd/dtd/labels"
    swapped = (labels / "val1.txt").read_text(), (labels / "test1.txt").read_text()
    (labels / "test1.txt").write_text(swapped[0])
    (labels / "val1.txt").write_text(swapped[1])
    after = read(tmp_path, "dtd")
    assert (len(before.test), len(after.test)) == (4, 6)
    assert capsys.readouterr().out.count("packed") == 3
    aircraft(tmp_path)
    before = read(tmp_path, "fgvc_aircraft").train_labels.tolist()
    labels = tmp_path / "fgvc-aircraft-2013b/data/images_variant_trainval.txt"
    labels.write_text(labels.read_text().replace("A320", "707-320", 1))  # of one image
    after = read(tmp_path, "fgvc_aircraft").train_labels.tolist()
    assert (before.count(0), after.count(0)) == (3, 4)


def test_packs_of_several_sets_stay(tmp_path, capsys):
    for write in (dtd, food):
        write(tmp_path)
    for name in ("dtd", "food101", "dtd", "food101"):
        read(tmp_path, name)
    assert capsys.readouterr().out.count("packed") == 2


DAMAGED = {
    "cifar10": "cifar-10-batches-py/test_batch",
    "cifar100": "cifar-100-python/meta",
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "svhn": "test_32x32.mat",
    "flowers102": "flowers-102/imagelabels.mat",
    "oxford_iiit_pet": "oxford-iiit-pet/annotations/test.txt",
    "food101": "food-101/meta/train.json",
    "dtd": "dtd/dtd/labels/val1.txt",
    "fgvc_aircraft": "fgvc-aircraft-2013b/data/images_variant_trainval.txt",
}
MISSING = DAMAGED | {
    "imagenette": "imagenette2/val/n03888257",
    "oxford_iiit_pet": "oxford-iiit-pet/images/Bengal_test0.jpg",
    "food101": "food-101/images/waffles/train1.jpg",
    "dtd": "dtd/dtd/images/banded/banded_val1.jpg",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("content", [b"\x80\x04", b""])
def test_a_damaged_file_is_one_line(tmp_path, name, content):
    WRITERS[name][0](tmp_path)
    path = tmp_path / DAMAGED[name]
    path.write_bytes(content)
    text = refusal(tmp_path, name)
    place = tmp_path / Path(DAMAGED[name]).parts[0]
    assert str(place) in text and "delete it and start with --download" in text


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_file_is_one_line(tmp_path, name):
    WRITERS[name][0](tmp_path)
    path = tmp_path / MISSING[name]
    path.rename(tmp_path / "elsewhere")
    text = refusal(tmp_path, name)
    for word in (str(tmp_path), Path(MISSING[name]).parts[0], "--download"):
        assert word in text
    assert not list(tmp_path.glob("*/.byol-pack"))


def test_files_with_another_md5_are_refused(tmp_path, monkeypatch):
    monkeypatch.undo()
    cifar10(tmp_path)
    assert "corrupted" in refusal(tmp_path, "cifar10")


def test_unreadable_images_are_left_out_and_named(tmp_path, capsys):
    dtd(tmp_path)
    (tmp_path / "dtd/dtd/images/banded/banded_val1.jpg").write_bytes(b"x")
    data = read(tmp_path, "dtd")
    assert len(data.train) == len(data.train_labels) == 9
    assert "1 unreadable images" in capsys.readouterr().err
    assert "--strict" in refusal(tmp_path, "dtd", strict=True)


@pytest.mark.parametrize("name", ["svhn", "flowers102"])
def test_without_scipy_one_line_says_so_before_anything_is_downloaded(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(published, "fetch", lambda *a: pytest.fail("downloaded"))
    text = refusal(tmp_path, name, download=True)
    assert text == f"--dataset {name} needs scipy: pip install scipy"


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), MemoryError()])
def test_an_error_of_the_machine_is_no_reason_to_delete(tmp_path, monkeypatch, error):
    dtd(tmp_path)
    monkeypatch.setattr(published, "_parts", mock.Mock(side_effect=error))
    with pytest.raises(type(error)):
        read(tmp_path, "dtd")


def test_a_package_that_does_not_load_is_no_reason_to_delete(tmp_path, monkeypatch):
    svhn_files(tmp_path)
    error = ImportError("numpy.core.multiarray failed to import")
    monkeypatch.setattr(published, "_parts", mock.Mock(side_effect=error))
    assert "install that package again" in refusal(tmp_path, "svhn")


# Downloads


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """(folder to serve, its address)."""
    served = tmp_path / "served"
    served.mkdir()
    handler = functools.partial(Quiet, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, args=(0.01,)).start()
        yield served, f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def archive(served, name, write) -> str:
    """Serve what `write` makes as NAME; its MD5."""
    source = served.parent / f"{name}-source"
    write(source)
    with tarfile.open(served / name, "w:gz") as tar:
        for path in source.iterdir():
            tar.add(path, path.name)
    return hashlib.md5((served / name).read_bytes()).hexdigest()


def left(root):
    return sorted(p.name for p in root.iterdir() if p.suffix != ".lock") if root.exists() else []


def test_a_set_is_downloaded_once_and_whole(tmp_path, server, monkeypatch):
    served, address = server
    root = tmp_path / "root"
    monkeypatch.setattr(tv.CIFAR10, "url", f"{address}/{tv.CIFAR10.filename}")
    monkeypatch.setattr(tv.CIFAR10, "tgz_md5", archive(served, tv.CIFAR10.filename, cifar10))
    assert len(read(root, "cifar10", download=True).train) == 15
    assert left(root) == ["cifar-10-batches-py"]
    (served / tv.CIFAR10.filename).unlink()
    assert len(read(root, "cifar10", download=True).test) == 4


def test_files_without_a_folder_are_downloaded(tmp_path, server, monkeypatch):
    served, address = server
    root = tmp_path / "root"
    svhn_files(served)
    for split, (_, name, _) in list(tv.SVHN.split_list.items())[:2]:
        md5 = hashlib.md5((served / name).read_bytes()).hexdigest()
        monkeypatch.setitem(tv.SVHN.split_list, split, [f"{address}/{name}", name, md5])
    (served / "test_32x32.mat").rename(served / "gone")
    assert "404" in refusal(root, "svhn", download=True) and left(root) == []
    (served / "gone").rename(served / "test_32x32.mat")
    assert len(read(root, "svhn", download=True).test) == 2
    assert left(root) == ["test_32x32.mat", "train_32x32.mat"]


def test_what_is_cut_off_or_killed_is_never_taken_for_the_set(tmp_path, server, monkeypatch):
    """torchvision has no MD5 of this archive, and takes any folder of that name for the set."""
    served, address = server
    root = tmp_path / "root"
    monkeypatch.setattr(tv.FGVCAircraft, "_URL", f"{address}/aircraft.tar.gz")
    archive(served, "aircraft.tar.gz", aircraft)
    whole = (served / "aircraft.tar.gz").read_bytes()
    for length in (len(whole) // 2, len(whole) // 9 * 8):
        (served / "aircraft.tar.gz").write_bytes(whole[:length])
        text = refusal(root, "fgvc_aircraft", download=True)
        assert "try again, or run" in text and "FGVCAircraft(DIR, download=True)" in text
        assert left(root) == []
    killed = root / ".fgvc-aircraft-2013b.partial" / "fgvc-aircraft-2013b"
    killed.mkdir(parents=True)  # as SIGKILL leaves it
    assert "no fgvc-aircraft-2013b there; add --download" in refusal(root, "fgvc_aircraft")
    (served / "aircraft.tar.gz").write_bytes(whole)
    assert len(read(root, "fgvc_aircraft", download=True).train) == 9
    assert left(root) == ["fgvc-aircraft-2013b"]
