"""What an earlier commit wrote, read and accepted: see tests/fixtures/README.md.

Flags and keys may be added; one that is there must stay, or its removal must be meant: then it
goes from the fixture in the same commit.
"""

import importlib
import json
import re
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.sample
import linear_eval
import train_byol
from core.options import options_of, tables_of
from eval import predict
from eval.trained import load
from training.method import Method

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED, FLAGS, SETTINGS = (
    json.loads((FIXTURES / f"{name}.json").read_text())
    for name in ("expected", "flags", "settings")
)
COMMANDS = (FIXTURES / "commands.txt").read_text().splitlines()


def method_of(name: str):
    """The class of variants/NAME.py, or None for another script."""
    module = importlib.import_module(name)
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == name]
    return next((c for c in classes if issubclass(c, Method)), None)


def configure(script: str, argv: list[str]):
    if method := method_of(script):
        return train_byol.configure(argv, method)
    return importlib.import_module(script).configure(argv)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """The sample's first four test images as PNG files."""
    folder = tmp_path_factory.mktemp("images")
    images = data.sample.load(Path("."), None).test.parts[0][:4, 0]
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [str(folder / f"{i}.png") for i in range(4)]


@pytest.mark.parametrize("name", ["finished/linear", "baseline"])
def test_classifiers_say_what_they_said(name, files, capsys):
    lines = predict.main(["--ckpt", str(FIXTURES / name), "--device", "cpu", *files])
    found = [[line["probabilities"][c] for c in data.sample.CLASSES] for line in lines]
    np.testing.assert_allclose(found, EXPECTED[name], atol=1e-4)


def test_an_encoder_is_evaluated_as_it_was(tmp_path):
    flags = ["--labels", "100", "--device", "cpu", "--quiet", "--out", str(tmp_path / "linear")]
    result = linear_eval.main(["--ckpt", str(FIXTURES / "finished"), *flags])
    assert abs(result["top1"] - EXPECTED["top1"]) < 0.2  # 8 of 4,000 images
    assert result["pretrain_seed"] == 3 and result["frame"] == [0, 0]  # images of 28 pixels, whole


def test_an_encoder_gives_the_features_it_gave(files):
    encoder, transform = load(FIXTURES / "finished")
    images = [transform(Image.open(file)) for file in files]
    np.testing.assert_allclose(
        encoder(torch.cat(images)), EXPECTED["features"], rtol=1e-3, atol=1e-4
    )


def test_a_checkpoint_goes_on_as_it_would_have(tmp_path):
    out = tmp_path / "run"
    shutil.copytree(FIXTURES / "stopped", out)
    recipe = ["--recipe", str(FIXTURES / "tables.toml")]
    train_byol.main(argv=[*recipe, "--out", str(out), "--resume", "--quiet"])
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[:4] == EXPECTED["losses"][:4]  # not written again
    assert losses[4] == pytest.approx(EXPECTED["losses"][4], rel=1e-4)
    assert losses == pytest.approx(EXPECTED["losses"], rel=0.05)
    state = torch.load(out / "encoder.pt", weights_only=True)
    old = torch.load(FIXTURES / "finished" / "encoder.pt", weights_only=True)
    assert state["meta"].keys() >= old["meta"].keys()
    assert list(state["state_dict"]) == list(old["state_dict"])


@pytest.mark.parametrize("case", SETTINGS)
def test_recipes_mean_what_they_meant(case):
    script, recipe = case.split()
    argv = ["--recipe", str(FIXTURES / f"{recipe}.toml")]
    if script in ("finetune", "linear_eval"):
        argv += ["--ckpt", str(FIXTURES / "finished")]
    config = configure(script, argv)
    for table, values in SETTINGS[case].items():
        found, options = asdict(getattr(config, table)), options_of(tables_of(type(config))[table])
        assert {k: found[k] for k in values if k in options} == {
            k: v for k, v in values.items() if k in options
        }, table


@pytest.mark.parametrize("script", FLAGS)
def test_flags_keep_their_names(script, capsys):
    with pytest.raises(SystemExit):
        if method := method_of(script):
            train_byol.main(method, ["--help"])
        else:
            importlib.import_module(script).main(argv=["--help"])
    found = set(re.findall(r"(?m)^  (--[a-z0-9._-]+)", capsys.readouterr().out))
    assert not set(FLAGS[script]) - found


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, tmp_path, monkeypatch):
    script, *argv = shlex.split(command.replace("FINISHED", str(FIXTURES / "finished")))
    monkeypatch.chdir(FIXTURES.parents[1])
    config = configure(script.removesuffix(".py").replace("/", "."), argv)
    assert getattr(config, "run", config).out
