"""A trained network on a user's own files: predictions, neighbors, features."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import finetune
import linear_eval
from data.decode import decode
from data.images import Images
from data.transform import EvalTransform
from eval import embed, predict, retrieve
from eval.features import extract
from eval.trained import load
from training.weights import read_weights


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, subset):
    """The subset's test images as PNG files, 000.png and so on."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, pixels in enumerate(subset.test.parts[0]):
        Image.fromarray(pixels[0]).save(folder / f"{number:03d}.png")
    return folder


def test_predictions_on_files_score_what_the_evaluation_measured(trained_run, pictures, subset):
    lines = predict.main(["--ckpt", str(trained_run), str(pictures)])
    assert [line["file"] for line in lines] == sorted(str(p) for p in pictures.iterdir())
    right = [line["class"] == subset.class_names[y]
             for line, y in zip(lines, subset.test_labels, strict=True)]  # fmt: skip
    measured = json.loads((trained_run / "linear/result.json").read_text())["top1"]
    assert 100 * np.mean(right) == pytest.approx(measured, abs=1e-4)
    assert all(sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-4) for line in lines)
    for line in lines:
        values = list(line["probabilities"].values())
        assert values == sorted(values, reverse=True)
        assert next(iter(line["probabilities"])) == line["class"]


@pytest.mark.parametrize("device", ["warp", "cuda:1"])
def test_a_device_that_is_not_there_is_one_line_before_the_weights(capsys, device):
    for main in (predict.main, retrieve.main):
        images = ["a.png"] if main is predict.main else ["--query", "a.png", "--gallery", "b"]
        with pytest.raises(SystemExit):
            main(["--ckpt", "nowhere", "--device", device, *images])
        assert capsys.readouterr().err.startswith(f"error: --device {device}: ")


@pytest.mark.parametrize("kind", ["mlp", "finetune"])
def test_other_classifiers_score_what_was_measured(
    sample, trained_run, pictures, subset, tmp_path, kind
):
    flags = ["--ckpt", str(trained_run), "--out", str(tmp_path / kind), "--quiet"]
    if kind == "mlp":
        result = linear_eval.main([*flags, "--head", "mlp"])
    else:
        result = finetune.main([*flags, "--steps", "8"])
    lines = predict.main(["--ckpt", str(tmp_path / kind), str(pictures)])
    right = [line["class"] == subset.class_names[y]
             for line, y in zip(lines, subset.test_labels, strict=True)]  # fmt: skip
    assert 100 * np.mean(right) == pytest.approx(result["top1"], abs=1e-4)


def test_the_output_is_text_or_json_lines(trained_run, pictures, capsys):
    file = str(pictures / "007.png")
    (line,) = predict.main(["--ckpt", str(trained_run), file, "--top", "2"])
    first, second = list(line["probabilities"].items())[:2]
    expected = f"{file}: {first[0]} {100 * first[1]:.1f} %, {second[0]} {100 * second[1]:.1f} %\n"
    assert capsys.readouterr().out == expected
    predict.main(["--ckpt", str(trained_run), file, "--json"])
    assert json.loads(capsys.readouterr().out) == line


def test_what_cannot_be_read_is_named_and_left_out(trained_run, pictures, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    shutil.copy(pictures / "001.png", tmp_path / "good.png")
    (tmp_path / "notes.txt").write_text("not an image by its name")
    lines = predict.main(["--ckpt", str(trained_run), str(tmp_path)])
    assert [line["file"] for line in lines] == [str(tmp_path / "good.png")]
    warning = capsys.readouterr().err.splitlines()
    assert len(warning) == 1 and "broken.png: left out, not readable" in warning[0]


@pytest.mark.parametrize(
    "change, words, text",
    [
        ("no linear", ["x.png"], "no classifier.pt there; train one with linear_eval.py"),
        ("two", ["x.png"], "several classifiers, name one"),
        ("encoder", ["x.png"], "holds no classifier"),
        ("", ["missing.png"], "missing.png: no such file or folder"),
        ("", ["empty"], "no readable image there"),
    ],
)
def test_wrong_input_is_one_line(trained_run, tmp_path, capsys, change, words, text):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    (tmp_path / "empty").mkdir()
    if change == "no linear":
        shutil.rmtree(run / "linear")
    elif change == "two":
        (run / "linear").rename(run / "a")
        shutil.copytree(run / "a", run / "b")
    elif change == "encoder":
        run = run / "encoder.pt"
    with pytest.raises(SystemExit) as stop:
        predict.main(["--ckpt", str(run), *(str(tmp_path / word) for word in words)])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and text in error[0]


def test_an_image_is_nearest_to_itself(trained_run, pictures, tmp_path, capsys):
    out = tmp_path / "alike.png"
    queries = [str(pictures / name) for name in ("003.png", "050.png")]
    flags = ["--ckpt", str(trained_run), "--query", *queries, "--gallery", str(pictures)]
    lines = retrieve.main([*flags, "--top", "4", "--out", str(out)])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    for query, line in zip(queries, lines, strict=True):
        assert line["query"] == query and line["nearest"][0]["file"] == query
        cosines = [found["cosine"] for found in line["nearest"]]
        assert cosines[0] == pytest.approx(1, abs=1e-5) and len(cosines) == 4
        assert cosines == sorted(cosines, reverse=True)
    picture = np.asarray(Image.open(out))
    assert picture.shape[1] == 5 * 100 + 4 and picture.shape[0] == 2 * 100 + 4 + 20
    # the query's tile and that of its nearest are the same pixels
    assert np.array_equal(picture[24:120, 4:100], picture[24:120, 104:200])
    before = out.read_bytes()
    with pytest.raises(SystemExit):
        retrieve.main([*flags, "--out", str(out)])
    assert "exists; name another file" in capsys.readouterr().err and out.read_bytes() == before


@pytest.fixture
def mine(tmp_path, pictures):
    """A folder data set with an unreadable file: train/{a,b}, test/{a,b}, unlabelled."""
    places = ["train/a", "train/b", "test/a", "test/b", "unlabelled"]
    for number in range(30):
        folder = tmp_path / "mine" / places[number % 5]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / f"{number:03d}.png", folder / f"{number}.png")
    (tmp_path / "mine/train/a/00broken.png").write_bytes(b"no image")
    return tmp_path / "mine"


def test_features_come_with_labels_and_the_names_of_their_files(trained_run, mine, tmp_path):
    out = tmp_path / "features.npz"
    flags = ["--ckpt", str(trained_run), "--dataset", "folder", "--data-root", str(mine)]
    embed.main([*flags, "--store-size", "28", "--out", str(out), "--quiet"])
    found = np.load(out)
    assert found["features"].shape == (30, 64) and found["features"].dtype == np.float32
    assert found["classes"].tolist() == ["a", "b"]
    labels = {"train/a": 0, "train/b": 1, "test/a": 0, "test/b": 1, "unlabelled": -1}
    encoder, transform = load(trained_run)
    assert transform.stored == 28 and len(set(found["files"])) == 30
    for name, label, split, row in zip(
        found["files"], found["labels"], found["splits"], found["features"], strict=True
    ):
        assert label == labels[name.rpartition("/")[0]] and split == name.split("/")[0]
        images = Images([decode(mine / str(name), 28)[None]])
        own = extract(encoder, images, transform)
        torch.testing.assert_close(torch.from_numpy(row), own[0], rtol=1e-3, atol=1e-4)


def test_evaluations_on_several_data_sets_stand_side_by_side(sample, trained_run, tmp_path, capsys):
    shutil.copytree(trained_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "linear")
    for n, name in enumerate(["n01440764", "n02102040"] * 2):
        path = tmp_path / "imagenette2" / ("train" if n < 2 else "val") / name / "1.JPEG"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (28, 28), ("red", "blue")[n % 2]).save(path)
    flags = ["--ckpt", str(tmp_path / "run"), "--data-root", str(tmp_path)]
    linear_eval.main([*flags, "--quiet"])
    linear_eval.main([*flags, "--dataset", "imagenette", "--store-size", "28"])
    assert "finetune.py --ckpt " in (said := capsys.readouterr().out)
    flags = ["--data-root", str(tmp_path), "--dataset", "imagenette", "--store-size", "28"]
    assert sorted(said.split()[-6:]) == sorted(flags)
    files = (tmp_path / "run").glob("*/result.json")
    results = {path.parent.name: json.loads(path.read_text()) for path in files}
    assert results["linear-imagenette"]["top1"] == 100.0
    assert results["linear-imagenette"]["test_images"] == 2 < results["linear"]["test_images"]


def test_another_data_set_is_not_put_among_the_images_of_a_folder(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["config"]["data"] |= {"dataset": "folder", "data_root": str(tmp_path)}
    config["config"]["recipe"]["data"] |= {"dataset": "folder", "data_root": str(tmp_path)}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    flags = ["--ckpt", str(tmp_path / "run")]
    assert linear_eval.configure(flags).data.data_root == str(tmp_path)
    flags += ["--dataset", "dtd"]
    assert linear_eval.configure(flags).data.data_root == "datasets"
    assert linear_eval.configure([*flags, "--data-root", "here"]).data.data_root == "here"


def test_another_folder_is_another_data_set(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["config"]["data"] |= {"dataset": "folder", "data_root": "a"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    flags = ["--ckpt", "run", "--dataset", "folder", "--data-root"]
    assert linear_eval.configure([*flags, "../" + tmp_path.name + "/a"]).run.out == "run/linear"
    assert linear_eval.configure([*flags, "b/c"]).run.out == "run/linear-c"


def test_a_file_without_its_run_is_evaluated_at_its_size(trained_run, tmp_path):
    shutil.copy(trained_run / "encoder.pt", tmp_path)
    config = linear_eval.configure(["--ckpt", str(tmp_path / "encoder.pt"), "--dataset", "dtd"])
    assert config.data.crop_size == 16 and config.run.out == str(tmp_path / "linear-dtd")


def test_features_of_a_named_data_set_have_numbers(sample, trained_run, tmp_path):
    out = tmp_path / "features.npz"
    embed.main(["--ckpt", str(trained_run), "--out", str(out), "--quiet"])
    found = np.load(out)
    sizes = {s: int((found["splits"] == s).sum()) for s in ("train", "unlabelled", "test")}
    assert sizes == {"train": 100, "unlabelled": 220, "test": 100}
    assert found["files"][100] == "unlabelled/0" and (found["labels"][100:320] == -1).all()
    with pytest.raises(SystemExit):  # it is not overwritten
        embed.main(["--ckpt", str(trained_run), "--out", str(out), "--quiet"])


def test_bare_weights_are_evaluated_and_predict_with_what_the_evaluation_used(
    sample, recipe, trained_run, pictures, subset, tmp_path, capsys
):
    """As with another library's weights: mean, std and frame are those of the evaluation."""
    torch.save(read_weights(trained_run).tensors, tmp_path / "theirs.pth")
    flags = ["--ckpt", str(tmp_path / "theirs.pth"), "--recipe", recipe]
    flags += ["--eval-size", "24", "--width", "0.125", "--out", str(tmp_path / "linear")]
    result = linear_eval.main(flags)
    last = capsys.readouterr().out.splitlines()[-1]  # the next command
    assert last.endswith(" --eval-size 24 --width 0.125")
    lines = predict.main(["--ckpt", str(tmp_path / "linear"), str(pictures)])
    right = [line["class"] == subset.class_names[y]
             for line, y in zip(lines, subset.test_labels, strict=True)]  # fmt: skip
    assert 100 * np.mean(right) == pytest.approx(result["top1"], abs=1e-4)


def test_weights_carry_their_geometry(trained_run, tmp_path):
    shutil.copy(trained_run / "encoder.pt", tmp_path / "encoder.pt")
    _, transform = load(tmp_path / "encoder.pt")
    assert (transform.size, transform.crop, transform.stored) == (0, 0, 28)
    assert transform.mean == read_weights(trained_run).meta["mean"]


def test_weights_that_say_nothing_are_taken_for_torchvisions(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    _, transform = load(tmp_path / "resnet18.pth")
    assert transform == EvalTransform(
        [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], size=256, crop=224, stored=256
    )


def test_a_notebooks_two_lines(trained_run, pictures, subset):
    """An image has the same features as a file, as pixels, in a batch and in a data set."""
    encoder, transform = load(trained_run)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    expected = extract(encoder, subset.test, transform)
    pixels = subset.test.take(np.arange(3))
    with Image.open(pictures / "001.png") as image:
        found = encoder(transform(image))
    assert found.shape == (1, encoder.feature_size)
    for rows in (found, encoder(transform(pixels[1])), encoder(transform(pixels))[1:2]):
        torch.testing.assert_close(rows, expected[1:2], rtol=1e-4, atol=1e-5)


def test_pictures_of_any_kind_are_brought_to_the_encoders_size(trained_run, tmp_path):
    """As eval.predict does: upright, on white, resized, center square."""
    _, transform = load(trained_run)
    image = Image.new("RGBA", (40, 90), (0, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 40, 45))
    image.getexif()[0x0112] = 3  # upside down
    exif = image.getexif()
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as opened:
        found = transform(opened)
    expected = transform(torch.from_numpy(decode(tmp_path / "x.png", 28)))
    assert found.shape == (1, 3, 28, 28) and torch.equal(found, expected)
    assert found[0, 0, 27, 14] < found[0, 0, 0, 14]  # blue below, white above


@pytest.mark.parametrize("ending", ["tif", "png", "jpg", "webp"])
def test_a_picture_is_turned_once(trained_run, tmp_path, ending):
    """The file is opened and not yet decoded, as in a notebook; decoding turns some formats."""
    image = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3) // 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / f"x.{ending}", exif=exif)
    _, transform = load(trained_run)
    with Image.open(tmp_path / f"x.{ending}") as opened:
        found = transform(opened)
    pixels = decode(tmp_path / f"x.{ending}", 28)
    torch.testing.assert_close(found, transform(torch.from_numpy(pixels)), rtol=0, atol=0.1)


def test_pixels_of_an_unknown_range_are_refused(trained_run):
    _, transform = load(trained_run)
    with pytest.raises(ValueError, match="range is unknown"):
        transform(Image.fromarray(np.random.rand(30, 30).astype(np.float32)))
    with pytest.raises(TypeError, match="uint8"):
        transform(torch.rand(3, 28, 28))
    black = transform(Image.new("RGB", (30, 30)))  # of no file
    assert torch.equal(black, transform(torch.zeros(3, 28, 28, dtype=torch.uint8)))
