"""Each variant has what BYOL has: training, resume, evaluation, collapse figures, processes."""

import ast
import importlib
import inspect
import json

import forked
import pytest
import torch
from conftest import metrics, trained

import linear_eval
import train_byol
from core.options import TABLES
from data import datasets
from eval.trained import load
from training.encoder import build_encoder, save_encoder
from variants.barlow_twins import BarlowTwins
from variants.dino import DINO
from variants.moco_v3 import MoCoV3
from variants.simclr import SimCLR
from variants.simsiam import SimSiam
from variants.vicreg import VICReg

VARIANTS = [SimSiam, SimCLR, BarlowTwins, VICReg, MoCoV3, DINO]
each = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def train(variant, recipe, out, *flags) -> dict:
    flags = ["--recipe", recipe, "--out", str(out), "--quiet", *flags]
    return train_byol.main(variant, flags)


@each
def test_it_trains_is_watched_resumed_and_evaluated(sample, recipe, tmp_path, variant):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(variant, recipe, whole, "--knn-every", "5")
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(10))
    assert rows[-1]["std/representation"] > 0 and 0 <= rows[-1]["knn_top1"] <= 100
    assert len({row["loss"] for row in rows}) == 10
    train(variant, recipe, parts, "--knn-every", "5", "--stop-after", "7")
    train(variant, recipe, parts, "--knn-every", "5", "--resume")
    assert trained(parts, 10) == trained(whole, 10) and metrics(parts) == rows
    result = linear_eval.main(["--ckpt", str(whole), "--quiet"])
    assert result["name"] == f"{variant.name}-linear" and 0 < result["top1"] <= 100
    files = whole / "encoder.pt", whole / "checkpoints/step-00000010.pt"
    saved, last = (load(file)[0].state_dict() for file in files)  # the same network, DINO's teacher
    assert all(torch.equal(saved[name], last[name]) for name in saved)


@each
def test_two_processes_of_the_script_train_like_one(sample, recipe, tmp_path, variant, float64):
    """Losses to 1e-9 in float64; tests/test_scaling.py compares the weights as well."""
    flags = ["--optimizer", "sgd", "--lr", "0.01", "--steps", "3"]
    train(variant, recipe, tmp_path / "one", *flags)
    forked.run(train, variant, recipe, tmp_path / "two", *flags, ranks=2)
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9) and len(losses[1]) == 3


@each
def test_its_file_and_its_table_have_its_name(variant):
    module = importlib.import_module(f"variants.{variant.name}")
    assert getattr(module, variant.__name__) is variant
    assert variant.name not in TABLES
    text = module.__doc__
    assert f"python -m variants.{variant.name}" in text and "arXiv" in text


@each
def test_its_file_has_at_most_sixty_lines_of_code(variant):
    source = inspect.getsource(importlib.import_module(f"variants.{variant.name}"))
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
        for line in range(node.body[0].lineno, node.body[0].end_lineno + 1)
    }
    lines = enumerate(source.splitlines(), 1)
    code = [i for i, t in lines if t.strip() and t.strip()[0] != "#" and i not in docstrings]
    assert len(code) <= 60


RECIPE = ["--recipe", "recipes/sample.toml", "--quiet", "--knn-every", "0", "--threads", "1"]


def linear(method, folder, *flags) -> float:
    """Top-1 with all 1,000 labels of the sample after pretraining."""
    forked.run(train_byol.main, method, [*RECIPE, "--out", str(folder), *flags], limit=300)
    forked.run(linear_eval.main, ["--ckpt", str(folder), "--quiet"], limit=300)
    return json.loads((folder / "linear/result.json").read_text())["top1"]


@pytest.fixture(scope="module")
def random_encoder(tmp_path_factory) -> float:
    """The control of reproduce.py: the seed's untrained network, all 1,000 labels."""
    folder = tmp_path_factory.mktemp("random")
    config = train_byol.configure(RECIPE)
    torch.manual_seed(0)
    e, encoder = config.encoder, build_encoder(config.encoder)
    mean, std = datasets.load(config.data).unlabelled.statistics()
    meta = dict(arch=e.arch, stem=e.stem, width=e.width, mean=mean, std=std)
    save_encoder(folder / "encoder.pt", encoder, meta)
    flags = ["--ckpt", str(folder), "--recipe", "recipes/sample.toml", "--quiet"]
    forked.run(linear_eval.main, flags, limit=300)
    return json.loads((folder / "linear-sample/result.json").read_text())["top1"]


@pytest.mark.slow
@each
def test_it_learns_more_than_a_random_encoder_knows(tmp_path, random_encoder, variant):
    found = linear(variant, tmp_path / "run", "--steps", "1200")
    assert found > random_encoder + 2, (found, random_encoder)
