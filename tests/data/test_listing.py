"""Folders as users have them: no image is lost, doubled or mixed in without a word."""

import codecs
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import unicodedata
from pathlib import Path

import forked
import pytest
import torch
from folders import CONFIG, flat, packed, read_only, reds
from PIL import Image

from core.errors import UserError
from data import decode, folder, listing
from data.preview import mosaic, save_png


def told(capsys) -> str:
    """What was printed as a warning, one line each."""
    return capsys.readouterr().err


# Folders: rights


def as_nobody(function, *arguments):
    """`function(*arguments)` without root's rights."""
    codecs.lookup("ascii")  # loaded now: Python's own files may be closed to nobody
    if os.geteuid() != 0:
        return function(*arguments)
    os.setresuid(65534, 65534, 0)
    try:
        return function(*arguments)
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def open_folder(monkeypatch):
    """A folder that everybody may enter and write to; pytest's own are closed."""
    path = Path(tempfile.mkdtemp(prefix="everybody-"))
    path.chmod(0o777)
    monkeypatch.chdir(path)
    yield path
    for where, _, _ in os.walk(path):
        os.chmod(where, 0o777)
    shutil.rmtree(path)


def refusal(call, *arguments) -> str:
    """The UserError's text."""
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("where", ["train/cat", "test/cat", "train/cat/deep", "unlabelled/x", "."])
@pytest.mark.parametrize("strict", [False, True])
def test_a_folder_that_cannot_be_listed_is_named(open_folder, where, strict):
    for name in ("ant", "cat", "cat/deep"):
        for split in ("train", "test"):
            flat(open_folder / "images" / split / name / "1.png", 5)
    flat(open_folder / "images" / "unlabelled" / "x" / "1.png", 5)
    os.chmod(open_folder / "images" / where, 0)
    text = as_nobody(refusal, lambda: packed(open_folder / "images", strict=strict))
    assert str(open_folder / "images" / where).rstrip("/.") in text and "Permission" in text


def test_a_folder_that_cannot_be_entered_is_named(open_folder):
    """Its names can be listed, no more."""
    flat(open_folder / "images" / "train" / "cat" / "1.png", 5)
    os.chmod(open_folder / "images" / "train" / "cat", 0o444)
    text = as_nobody(refusal, packed, open_folder / "images")
    assert "train/cat/1.png: Permission denied" in text


def test_a_file_that_cannot_be_read_is_left_out_and_named(open_folder, capfd):
    images = open_folder / "images"
    for n in range(3):
        flat(images / "train" / "cat" / f"{n}.png", n)
    os.chmod(images, 0o777)
    os.chmod(images / "train" / "cat" / "1.png", 0)
    assert as_nobody(lambda: reds(packed(images).train)) == [0, 2]
    if os.geteuid() == 0:
        assert reds(packed(images).train) == [0, 1, 2]  # whoever can read it gets it


def test_an_image_that_was_out_of_reach_comes_back(root, monkeypatch):
    """As a cloud's or a network's file, which is the same when it can be read again."""
    with monkeypatch.context() as patch:
        real = decode.decode

        def offline(path, size):
            if path.name == "a.png":
                raise TimeoutError(110, "Connection timed out")
            return real(path, size)

        patch.setattr(decode, "decode", offline)
        for _ in range(2):
            assert reds(packed(root).train) == [12, 10, 13]
    assert reds(packed(root).train) == [12, 11, 10, 13]


# Folders: links


def test_a_link_to_a_class_beside_it_is_one_line(root):
    os.symlink(root / "train" / "dog", root / "train" / "eel")
    with pytest.raises(UserError, match="eel.*dog.* one folder, by a link"):
        packed(root)


def linked(root, *pairs):
    for link, target in pairs:
        (root / link).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, root / link)


SHAPES = {
    "two classes into each other": [("train/cat/x", "../dog"), ("train/dog/y", "../cat")],
    "a whole split": [("val", "train"), ("unlabelled/all", "../train")],
    "outside, twice": [("train/cat/x", "{out}"), ("train/dog/y", "{out}")],
    "outside, and a part of it": [("train/cat/x", "{out}"), ("train/dog/y", "{out}/sub")],
    "a part of it, then outside": [("train/cat/x", "{out}/sub"), ("train/dog/y", "{out}")],
    "outside, and back to another class": [
        ("train/cat/x", "{out}"),
        ("{out}/b", "{root}/train/dog"),
    ],
}


@pytest.mark.parametrize("pairs", SHAPES.values(), ids=SHAPES)
def test_a_folder_that_is_reached_twice_is_one_line(root, pairs):
    outside = root.parent / "outside"
    flat(outside / "sub" / "1.png", (70, 0, 0))
    names = {"out": outside, "root": root}
    linked(root, *[(a.format(**names), b.format(**names)) for a, b in pairs])
    with pytest.raises(UserError, match="are one folder, by a link"):
        packed(root)


CIRCLES = {
    "itself": [("train/cat/x", ".")],
    "the class": [("train/cat/deep/x", "..")],
    "the root": [("train/cat/x", "../..")],
    "above the root": [("train/cat/x", "../../..")],
    "outside and back": [("train/cat/x", "{out}"), ("{out}/back", "{root}/train/cat")],
    "a link that is itself": [("train/cat/x", "x")],
}


@pytest.mark.parametrize("pairs", CIRCLES.values(), ids=CIRCLES)
def test_circles_pack_each_image_once(root, pairs):
    outside = root.parent / "outside"
    outside.mkdir()
    names = {"out": outside, "root": root}
    linked(root, *[(a.format(**names), b.format(**names)) for a, b in pairs])
    data = packed(root)
    assert reds(data.train) == [12, 11, 10, 13] and data.train_labels.tolist() == [0, 1, 1, 2]


def test_images_that_links_show_twice_are_told(root, capsys):
    linked(root, ("train/dog/again.png", "../cat/a.png"), ("unlabelled/h.png", "f.png"))
    data = packed(root)
    assert reds(data.train) == [12, 11, 10, 11, 13] and reds(data.unlabelled) == [90, 90, 91]
    text = told(capsys)
    assert "2 images are there twice, by links: train/cat/a.png = train/dog/again.png" in text


def test_hard_links_are_told(root, capsys):
    """As programs that save space leave equal files: here an image of training and test."""
    os.link(root / "train" / "cat" / "a.png", root / "test" / "ant" / "z.png")
    os.symlink("z.png", root / "test" / "ant" / "zz.png")
    assert reds(packed(root).test) == [61, 11, 11, 60]
    text = "warning: 2 images are there twice, by links: test/ant/z.png = test/ant/zz.png, "
    assert told(capsys) == text + "test/ant/z.png = train/cat/a.png\n"


def test_links_that_lead_nowhere_are_told(root, capsys):
    """Classes on a disk that is not there; an image that was not fetched is unreadable."""
    away = [("train/eel", "/no/eel"), ("test/cat", "/no/cat"), ("train/cat/deep", "a.png/x")]
    linked(root, *away, ("train/cat/z.png", "/no/z.png"))
    assert reds(packed(root).train) == [12, 11, 10, 13]
    nowhere, unreadable = told(capsys).splitlines()
    assert nowhere == "warning: links that lead nowhere: test/cat, train/cat/deep, train/eel"
    assert "1 unreadable images" in unreadable and "train/cat/z.png" in unreadable


def test_test_images_are_no_training_images_where_train_leads_nowhere(root):
    shutil.rmtree(root / "train")
    linked(root, ("train", "/no/train"))
    with pytest.raises(UserError, match="1 dead links"):
        packed(root)


def test_a_link_to_a_folder_above_the_one_it_is_in_brings_what_is_there(root):
    flat(root.parent / "outside" / "sub" / "1.png", (70, 0, 0))
    flat(root.parent / "outside" / "2.png", (71, 0, 0))
    linked(root, ("train/cat/x", "../../../outside/sub"))
    linked(root.parent, ("outside/sub/up", ".."))
    assert reds(packed(root).train) == [12, 11, 10, 70, 71, 13]


def test_links_that_have_changed_places_are_packed_again(root, monkeypatch):
    """To images of equal size and times: only the classes are swapped."""
    pool, real = root.parent / "pool", os.stat
    for red in (100, 101):
        flat(pool / f"{red}.bmp", (red, 0, 0))
    equal = real(pool / "100.bmp")
    same = lambda path, **how: equal if "bmp" in str(path) else real(path, **how)  # noqa: E731
    monkeypatch.setattr(listing.os, "stat", same)
    linked(root, ("train/cat/a.bmp", pool / "100.bmp"), ("train/dog/a.bmp", pool / "101.bmp"))
    assert reds(packed(root).train) == [12, 100, 11, 10, 101, 13]
    (root / "train/cat/a.bmp").rename(root / "x")
    (root / "train/dog/a.bmp").rename(root / "train/cat/a.bmp")
    (root / "x").rename(root / "train/dog/a.bmp")
    assert reds(packed(root).train) == [12, 101, 11, 10, 100, 13]


def reachable(folder: str) -> set[str]:
    """The real paths of all files that links and folders lead to."""
    files, folders, waiting = set(), set(), [folder]
    while waiting:
        real = os.path.realpath(waiting.pop())
        if real not in folders:
            folders.add(real)
            for entry in os.scandir(real):
                waiting.append(entry.path) if entry.is_dir() else files.add(entry.path)
    return files


def test_of_any_links_each_image_is_packed_once_or_one_line_says_why(tmp_path):
    outcomes = []
    for seed in range(100):
        rng, top = random.Random(seed), tmp_path / str(seed)
        folders = [top / "root", top / "root/train/a", top / "root/train/b", top / "out/deep"]
        for n in range(4):
            folders.append(rng.choice(folders) / f"d{n}")
        for n, path in enumerate(folders):
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{n}.png").touch()
        for n in range(rng.randint(1, 3)):
            os.symlink(rng.choice([*folders, top]), rng.choice(folders) / f"link{n}")
        try:
            found = list(listing.walk(top / "root")[0].values())
            assert len(found) == len(set(found)) and set(found) == reachable(top / "root"), seed
            outcomes.append("packed")
        except UserError as error:
            assert "are one folder, by a link" in str(error)
            outcomes.append("told")
    assert min(outcomes.count("packed"), outcomes.count("told")) > 20


def test_pipes_are_no_images(root):
    """Opening one would wait for ever."""
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    assert "train/cat/pipe.png" not in listing.walk(root)[0]


def test_a_tree_of_any_depth_is_walked(tmp_path):
    """As a program leaves it that copies a folder into itself again and again."""
    deep, limit = "x/" * 100, sys.getrecursionlimit()
    (tmp_path / deep).mkdir(parents=True)
    (tmp_path / deep / "1.png").touch()
    sys.setrecursionlimit(len(traceback.extract_stack()) + 50)
    try:
        assert listing.image_files(tmp_path) == [deep + "1.png"]
    finally:
        sys.setrecursionlimit(limit)


# Folders: what is no data


def test_what_we_wrote_ourselves_is_no_data(trained_run, tmp_path, monkeypatch):
    """Loose images and our output in one folder: the same set each time."""
    monkeypatch.chdir(tmp_path)
    for n in range(4):
        flat(tmp_path / f"{n}.png", (n, 0, 0))
    first = reds(packed(Path()).unlabelled)
    shutil.copytree(trained_run, tmp_path / "runs" / "byol")
    assert list((tmp_path / "runs").rglob("*.png"))  # TensorBoard's
    for name in ("table", "runs/table"):
        flat(tmp_path / name / "results.png", (99, 0, 0))
        (tmp_path / name / "settings.json").write_text("{}")
        (tmp_path / name / "cells.jsonl").write_text("")
    tile = decode.decode(tmp_path / "0.png", 8).pixels
    save_png(mosaic([[torch.from_numpy(tile) / 255]]), tmp_path / "preview.png")
    assert reds(packed(Path()).unlabelled) == first == [0, 1, 2, 3]
    assert len(packed(Path(), strict=True).unlabelled) == 4


SYSTEM = ["@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", ".thumbnails/1.png", "._a.png", ".DS_Store",
          "__MACOSX/a.png", "#recycle/a.png", "lost+found/a.png", "$RECYCLE.BIN/a.png",
          "$Recycle.Bin/S-1-5/a.png", "~snapshot/daily/a.png", "LOST.DIR/a.png"]  # fmt: skip


def test_what_systems_leave_behind_is_no_data(root, capsys):
    for name in SYSTEM:
        for place in (root, root / "train" / "cat", root / "train", root / "unlabelled"):
            flat(root / "x.png", (200, 0, 0))
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "x.png").rename(place / name)
    data = packed(root)
    assert data.class_names == ["ant", "cat", "dog"] and told(capsys) == ""
    assert reds(data.train) == [12, 11, 10, 13] and reds(data.unlabelled) == [90, 91]


def test_images_of_python_packages_are_no_data(root, capsys):
    for place in ("cat/venv", "eel"):
        flat(root / "train" / place / "lib" / "matplotlib" / "move.png", (200, 0, 0))
        (root / "train" / place / "pyvenv.cfg").touch()
    assert reds(packed(root).train) == [12, 11, 10, 13]
    assert told(capsys) == "warning: no images in train/eel\n"


def test_images_in_a_run_folder_stay(trained_run, root):
    """Where a run was written among images; its own pictures are left out without hidden files."""
    shutil.copytree(trained_run, root / "train" / "cat", dirs_exist_ok=True)
    (root / "train" / "cat" / ".lock").unlink()
    assert reds(packed(root).train) == [12, 11, 10, 13]


# Folders: names


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    flat(tmp_path / "train" / composed / "1.png", (1, 0, 0))
    flat(tmp_path / "train" / decomposed / "2.png", (2, 0, 0))
    flat(tmp_path / "train" / "zoo" / "3.png", (3, 0, 0))
    flat(tmp_path / "test" / decomposed / "4.png", (4, 0, 0))
    flat(tmp_path / "test" / "zoo" / "5.png", (5, 0, 0))
    data = packed(tmp_path)
    assert data.class_names == [composed, "zoo"] and sorted(reds(data.train)) == [1, 2, 3]
    assert data.train_labels.tolist() == [0, 0, 1] and data.test_labels.tolist() == [0, 1]


NAMES = [b"\xff\xfe", b"tab\there", b"line\nfeed", b"$x^2$", b"a|b`c`", b"<script>", b"_under",
         b"'\"\\", "日本🐜".encode(), b" space ", b"-rf", "\u202eleft".encode(), b"%s"]  # fmt: skip


def test_names_are_arbitrary_bytes(tmp_path, capsys):
    for n, name in enumerate(NAMES):
        path = os.path.join(os.fsencode(tmp_path), b"train", name, name + b".png")
        os.makedirs(os.path.dirname(path))
        Image.new("RGB", (20, 20), (n, 0, 0)).save(Path(os.fsdecode(path)))
    data = packed(tmp_path)
    assert sorted(reds(data.train)) == list(range(len(NAMES)))
    assert all(name.isprintable() for name in data.class_names)
    assert len(set(data.class_names)) == len(NAMES)
    files = folder.file_names(tmp_path, CONFIG, "train")
    for name, red in zip(files, reds(data.train), strict=True):
        assert os.fsencode(name).startswith(b"train/" + NAMES[red])


def test_class_folders_without_images_are_told_each_time(root, capsys):
    (root / "train" / "eel").mkdir()
    (root / "test" / "cat").mkdir()
    (root / "test" / "cat" / "1.heic").write_bytes(b"x")
    for _ in range(2):
        packed(root)
        assert told(capsys) == "warning: no images in test/cat, train/eel\n"


def test_test_images_of_which_none_can_be_read_are_one_line(root):
    """Of the class without any, nothing can be named."""
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"")
    shutil.rmtree(root / "test" / "ant")
    with pytest.raises(UserError, match="test/dog: no image there can be read"):
        packed(root)


def test_folders_of_any_name_are_printed_on_one_line(root, capsys):
    odd = root.rename(root.with_name("my\nphotos\x1b[31m" + "é" * 118))
    (odd / ".byol-pack").touch()  # so that ours is named after it
    (odd / "train" / "cat" / "bad.png").touch()
    assert len(packed(odd).train) == 4
    out, err = capsys.readouterr()
    assert out.count("\n") == err.count("\n") == 1 and "\x1b" not in out + err
    (odd / "test" / "ee\nl").mkdir()
    flat(odd / "test" / "ee\nl" / "1.png", 5)
    assert "\n" not in refusal(packed, odd)


def test_one_of_several_processes_warns(root):
    (root / "train" / "cat" / "bad.png").write_bytes(b"")
    (root / "train" / "eel").mkdir()
    children = forked.Children(lambda: len(packed(root).train), ranks=2)
    outcomes = children.wait()
    assert [o.value for o in outcomes] == [4, 4]
    assert outcomes[0].output.count("warning:") == 2 and "warning" not in outcomes[1].output


# Packs


def fresh(root) -> list[int]:
    """What a new process loads."""
    return forked.run(lambda: reds(packed(root).train))[0]


def test_packs_here_and_there_never_give_yesterdays_images(root, monkeypatch):
    """Adding and removing, writable and read-only in turn: what is loaded is what is there."""
    new, cat = root / "train" / "cat" / "c.png", [12, 11, 10, 13]
    assert fresh(root) == cat
    flat(new, (50, 0, 0))
    with read_only(monkeypatch, root):
        assert fresh(root) == [12, 11, 10, 50, 13]
    new.unlink()  # the pack beside the images is right again, the newer one elsewhere is not
    assert fresh(root) == cat
    with read_only(monkeypatch, root):
        assert fresh(root) == cat
    flat(new, (51, 0, 0))
    assert fresh(root) == [12, 11, 10, 51, 13]
    with read_only(monkeypatch, root):
        assert fresh(root) == [12, 11, 10, 51, 13]


def test_images_that_have_changed_places_are_packed_again(root):
    """Equal sizes and equal times, as an archive leaves them: only the classes are swapped."""
    a, b = root / "train" / "cat" / "a.bmp", root / "train" / "dog" / "b.bmp"
    for path, red in ((a, 100), (b, 101)):
        flat(path, (red, 0, 0))
        os.utime(path, ns=(1, 1))
    assert fresh(root) == [12, 100, 11, 10, 101, 13]
    a.rename(root / "x.bmp")
    b.rename(a)
    (root / "x.bmp").rename(b)
    assert fresh(root) == [12, 101, 11, 10, 100, 13]


def test_old_packs_go(root):
    for red in range(3):
        flat(root / "train" / "cat" / "new.png", (red, 0, 0))
        fresh(root)
    packed(root, store_size=24)
    names = sorted(p.name.split("-")[0] for p in (root / ".byol-pack").iterdir())
    assert names == ["16", "24", "lock"]


def test_a_cut_or_unreadable_pack_is_made_again(root):
    fresh(root)
    for name, content in [("train.npy", b"\x93NUMPY"), ("manifest.json", b"[]")]:
        (pack,) = (root / ".byol-pack").glob("16-*")
        (pack / name).write_bytes(content)
        assert fresh(root) == [12, 11, 10, 13]


def test_a_killed_process_leaves_no_pack(root):
    """It is killed while it packs; an image comes in the meantime."""
    for n in range(300):
        flat(root / "train" / "dog" / f"z{n}.png", (99, 0, 0))
    children = forked.Children(packed, root)
    children.until(lambda: list((root / ".byol-pack").glob("*.partial/train.npy")))
    os.kill(children.pids[0], signal.SIGKILL)
    assert children.wait()[0].code == -signal.SIGKILL
    assert list((root / ".byol-pack").glob("*.partial"))
    flat(root / "train" / "cat" / "c.png", (50, 0, 0))
    assert fresh(root)[:5] == [12, 11, 10, 50, 13]
    assert len(list((root / ".byol-pack").iterdir())) == 2  # the lock and the pack


IN_THE_WAY = {
    "a file": lambda pack: pack.touch(),
    "a file that may be run, as on a Windows share": lambda pack: pack.touch(0o777),
    "a link to nowhere": lambda pack: pack.symlink_to("/no/folder"),
    "a link to itself": lambda pack: pack.symlink_to(".byol-pack"),
    "a folder called lock": lambda pack: (pack / "lock").mkdir(parents=True),
}


@pytest.mark.parametrize("put", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_what_is_in_the_place_of_packs_stays(root, put):
    put(root / ".byol-pack")
    before = os.lstat(root / ".byol-pack").st_ino
    for _ in range(2):
        assert fresh(root) == [12, 11, 10, 13]
    assert os.lstat(root / ".byol-pack").st_ino == before
    assert len(list((root.parent / "datasets" / "packs").glob("images-*/16-*"))) == 1


def test_a_file_in_the_place_of_a_pack_stays(root):
    fresh(root)
    (pack,) = (root / ".byol-pack").glob("16-*")
    shutil.rmtree(pack)
    pack.touch()
    assert fresh(root) == [12, 11, 10, 13] and pack.is_file()


def test_two_sets_may_share_a_folder_of_packs(root):
    shutil.copytree(root, root.parent / "other")
    flat(root.parent / "other" / "train" / "cat" / "a.png", (77, 0, 0))
    (root.parent / "packs").mkdir()
    for path in (root, root.parent / "other"):
        linked(path, (".byol-pack", root.parent / "packs"))
    for _ in range(2):
        assert fresh(root) == [12, 11, 10, 13]
        assert fresh(root.parent / "other") == [12, 77, 10, 13]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
@pytest.mark.parametrize("closed", ["pack", "partial", "folder"])
def test_packs_of_somebody_else_are_in_nobodys_way(open_folder, closed):
    """The folder is everybody's: a pack made under umask 077, one that was being made; or not."""
    images = open_folder / "images"
    for n, name in enumerate(("ant", "bee")):
        flat(images / "train" / name / "1.png", (n, 0, 0))
    images.chmod(0o777)
    assert fresh(images) == [0, 1]  # by root
    (images / ".byol-pack").chmod(0o700 if closed == "folder" else 0o777)
    (images / ".byol-pack" / "lock").chmod(0o666)
    (pack,) = (images / ".byol-pack").glob("16-*")
    if closed == "pack":
        pack.chmod(0o700)
    if closed == "partial":
        pack.rename(pack.with_suffix(".partial"))
    assert as_nobody(lambda: reds(packed(images).train)) == [0, 1]
    assert (open_folder / "datasets").exists() == (closed == "folder")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
@pytest.mark.parametrize("closed", ["folder", "lock", "files"])
def test_a_pack_folder_of_somebody_else_falls_back_to_ours(open_folder, closed):
    images = open_folder / "images"
    flat(images / "train" / "ant" / "1.png", (1, 0, 0))
    flat(images / "train" / "bee" / "2.png", (2, 0, 0))
    images.chmod(0o777)
    assert fresh(images) == [1, 2]  # by root
    modes = {"folder": 0o755, "lock": 0o777, "files": 0o755}
    (images / ".byol-pack").chmod(modes[closed])
    for file in (images / ".byol-pack").rglob("*.npy") if closed == "files" else ():
        file.chmod(0o600)
    if closed != "files":
        flat(images / "train" / "bee" / "3.png", (3, 0, 0))
    expected = [1, 2] if closed == "files" else [1, 2, 3]
    assert as_nobody(lambda: reds(packed(images).train)) == expected
    assert list((open_folder / "datasets" / "packs").glob("images-*/16-*"))
