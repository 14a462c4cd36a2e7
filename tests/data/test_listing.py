"""Folders as users have them: no image is lost, doubled or mixed in without a word."""

import codecs
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path

import forked
import pytest
import torch
from folders import CONFIG, flat, packed, read_only, reds
from PIL import Image

from core.errors import UserError, reason_of
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
    """The one line that is printed for the error."""
    try:
        call(*arguments)
    except (UserError, OSError) as error:
        return reason_of(error)
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


def test_a_file_that_cannot_be_opened_is_named_and_nothing_is_packed(open_folder):
    """Whoever can read it gets it; it is not the image that is damaged."""
    images = open_folder / "images"
    for n in range(3):
        flat(images / "train" / "cat" / f"{n}.png", (n, 0, 200))
    os.chmod(images, 0o777)
    os.chmod(images / "train" / "cat" / "1.png", 0)
    text = as_nobody(refusal, packed, images)
    assert "train/cat/1.png: Permission denied" in text
    os.chmod(images / "train" / "cat" / "1.png", 0o644)
    assert as_nobody(lambda: reds(packed(images).train)) == [0, 1, 2]


# Folders: links


def linked(root, *pairs):
    for link, target in pairs:
        (root / link).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, root / link)


SHAPES = {
    "a class beside it": [("train/eel", "dog")],
    "two classes into each other": [("train/cat/x", "../dog"), ("train/dog/y", "../cat")],
    "a whole split": [("val", "train"), ("unlabelled/all", "../train")],
    "outside, twice": [("train/cat/x", "{out}"), ("train/dog/y", "{out}")],
    "outside, and a part of it": [("train/cat/x", "{out}"), ("train/dog/y", "{out}/sub")],
    "a part of it, then outside": [("train/cat/x", "{out}/sub"), ("train/dog/y", "{out}")],
    "outside, and back to another class": [
        ("train/cat/x", "{out}"),
        ("{out}/b", "{root}/train/dog"),
    ],
    "to itself": [("train/cat/x", ".")],
    "to the root": [("train/cat/x", "../..")],
    "above the root": [("train/cat/x", "../../..")],
}


@pytest.mark.parametrize("pairs", SHAPES.values(), ids=SHAPES)
def test_a_folder_that_is_reached_twice_is_one_line(root, pairs):
    outside = root.parent / "outside"
    flat(outside / "sub" / "1.png", (70, 0, 0))
    names = {"out": outside, "root": root}
    linked(root, *[(a.format(**names), b.format(**names)) for a, b in pairs])
    with pytest.raises(UserError, match="are one folder, by a link"):
        packed(root)


@pytest.mark.parametrize(
    "link", ["train", "train/eel", "train/cat/deep", "train/cat/z.png", "test/x"]
)
def test_a_link_that_leads_nowhere_is_named(root, link):
    """Such as a class, or all of them, on a disk that is not there."""
    if link == "train":
        shutil.rmtree(root / "train")
    linked(root, (link, "/no/such"))
    assert f"{root}/{link}: No such file" in refusal(packed, root)


def test_links_that_have_changed_places_are_packed_again(root):
    """To images of equal size and times: only the classes are swapped."""
    pool = root.parent / "pool"
    for red in (100, 101):
        flat(pool / f"{red}.bmp", (red, 0, 0))
        os.utime(pool / f"{red}.bmp", ns=(1, 1))
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
            names = listing.image_files(top / "root")
            paths = [os.path.realpath(top / "root" / name) for name in names]
            assert len(paths) == len(set(paths)) and set(paths) == reachable(top / "root"), seed
            outcomes.append("packed")
        except UserError as error:
            assert "are one folder, by a link" in str(error)
            outcomes.append("told")
    assert min(outcomes.count("packed"), outcomes.count("told")) > 5


# Folders: what is no data


def test_what_we_wrote_ourselves_is_no_data(trained_run, tmp_path, monkeypatch):
    """Loose images and our output in one folder: the same set each time."""
    monkeypatch.chdir(tmp_path)
    for n in range(4):
        flat(tmp_path / f"{n}.png", (n, 0, 0))
    first = reds(packed(Path()).unlabelled)
    shutil.copytree(trained_run, tmp_path / "runs" / "byol")
    tile = decode.decode(tmp_path / "0.png", 8)
    save_png(mosaic([[torch.from_numpy(tile) / 255]], ["0"]), tmp_path / "preview.png")
    assert reds(packed(Path()).unlabelled) == first == [0, 1, 2, 3]
    assert len(packed(Path(), strict=True).unlabelled) == 4


SYSTEM = ["@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", ".thumbnails/1.png", "._a.png", ".DS_Store",
          "__MACOSX/a.png", "#recycle/a.png", "lost+found/a.png", "$RECYCLE.BIN/a.png",
          "$Recycle.Bin/S-1-5/a.png", "~snapshot/daily/a.png"]  # fmt: skip


def test_what_systems_leave_behind_is_no_data(root, capsys):
    for name in SYSTEM:
        for place in (root, root / "train" / "cat", root / "train", root / "unlabelled"):
            flat(root / "x.png", (200, 0, 0))
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (root / "x.png").rename(place / name)
    data = packed(root)
    assert data.class_names == ["ant", "cat", "dog"] and told(capsys) == ""
    assert reds(data.train) == [12, 11, 10, 13] and reds(data.unlabelled) == [90, 91]


def test_images_in_a_run_folder_stay(trained_run, root):
    """Where a run was written among images; its own pictures are left out without hidden files."""
    shutil.copytree(trained_run, root / "train" / "cat", dirs_exist_ok=True)
    (root / "train" / "cat" / ".lock").unlink()
    assert reds(packed(root).train) == [12, 11, 10, 13]


# Folders: names


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
    files = folder.load(tmp_path, CONFIG).files["train"]
    for name, red in zip(files, reds(data.train), strict=True):
        assert os.fsencode(name).startswith(b"train/" + NAMES[red])


def test_a_pipe_is_not_waited_for(root):
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    assert len(packed(root).train) == 4


def test_test_images_are_no_pretraining_data(root):
    shutil.move(root / "train", root / "Train")
    assert "rename Train to train" in refusal(packed, root)
    shutil.rmtree(root / "Train")
    assert "test/ without train/" in refusal(packed, root)
    shutil.move(root / "test", root / "val")
    assert "val/ without train/" in refusal(packed, root)


def test_images_in_val_are_test_images_where_there_is_no_test(root):
    flat(root / "val" / "dog" / "v.png", (70, 0, 200))
    assert sorted(reds(packed(root).test)) == [60, 61]
    shutil.rmtree(root / "test")
    flat(root / "test" / "1.png", 9)  # of unknown class
    data = packed(root)
    assert reds(data.test) == [70] and data.test_labels.tolist() == [2]
    assert data.files["test"] == ["val/dog/v.png"] and len(data.train) == 4
    (root / "val" / "cat").mkdir()
    assert "val/cat: no images in it" in refusal(packed, root)
    (root / "val" / "cat").rename(root / "val" / "eel")
    flat(root / "val" / "eel" / "1.png", 5)
    assert "val/eel: train/ has no images of that class" in refusal(packed, root)


@pytest.mark.parametrize("name", ["train/eel", "test/cat"])
def test_a_class_folder_without_images_is_one_line(root, name):
    (root / name).mkdir()
    (root / name / "1.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name}: no images in it"):
        packed(root)


def test_test_images_of_which_none_can_be_read_are_one_line(root):
    """Of the class without any, nothing can be named."""
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"")
    shutil.rmtree(root / "test" / "ant")
    with pytest.raises(UserError, match="no image of class dog in test can be decoded"):
        packed(root)


def test_folders_of_any_name_are_printed_on_one_line(root, capsys):
    odd = root.rename(root.with_name("my\nphotos\x1b[31m" + "é" * 118))
    (odd / ".byol-pack").touch()  # so that ours is named after it
    (odd / "train" / "cat" / "bad.png").touch()
    assert len(packed(odd).train) == 4
    out, err = capsys.readouterr()
    assert out.count("\n") == err.count("\n") == 1 and "\x1b" not in out + err
    flat(odd / "test" / "ee\nl" / "1.png", 5)
    assert "\n" not in refusal(packed, odd)


def test_one_of_several_processes_warns(root):
    (root / "train" / "cat" / "bad.png").write_bytes(b"")
    children = forked.Children(lambda: len(packed(root).train), ranks=2)
    outcomes = children.wait()
    assert [o.value for o in outcomes] == [4, 4]
    assert outcomes[0].output.count("warning:") == 1 and "warning" not in outcomes[1].output


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


def test_a_killed_process_leaves_no_pack(root):
    """It is killed while it packs; an image comes in the meantime."""
    for n in range(300):
        flat(root / "train" / "dog" / f"z{n}.png", (99, 0, 0))
    children = forked.Children(packed, root)
    children.until(lambda: list((root / ".byol-pack").glob("*.partial/train.bin")))
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
@pytest.mark.parametrize("closed", ["partial", "folder"])
def test_packs_of_somebody_else_are_in_nobodys_way(open_folder, closed):
    """The folder is everybody's, with a pack that somebody else was making; or it is closed."""
    images = open_folder / "images"
    for n, name in enumerate(("ant", "bee")):
        flat(images / "train" / name / "1.png", (n, 0, 0))
    images.chmod(0o777)
    assert fresh(images) == [0, 1]  # by root
    (images / ".byol-pack").chmod(0o700 if closed == "folder" else 0o777)
    (images / ".byol-pack" / "lock").chmod(0o666)
    (pack,) = (images / ".byol-pack").glob("16-*")
    if closed == "partial":
        pack.rename(pack.with_suffix(".partial"))
    assert as_nobody(lambda: reds(packed(images).train)) == [0, 1]
    assert (open_folder / "datasets").exists() == (closed == "folder")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be two users")
@pytest.mark.parametrize("closed", ["folder", "lock"])
def test_a_pack_folder_of_somebody_else_falls_back_to_ours(open_folder, closed):
    images = open_folder / "images"
    flat(images / "train" / "ant" / "1.png", (1, 0, 0))
    flat(images / "train" / "bee" / "2.png", (2, 0, 0))
    images.chmod(0o777)
    assert fresh(images) == [1, 2]  # by root
    (images / ".byol-pack").chmod(0o755 if closed == "folder" else 0o777)
    flat(images / "train" / "bee" / "3.png", (3, 0, 0))
    assert as_nobody(lambda: reds(packed(images).train)) == [1, 2, 3]
    assert list((open_folder / "datasets" / "packs").glob("images-*/16-*"))
