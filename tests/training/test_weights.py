"""Weights from everywhere load equal, or are refused with a line that says why."""

import copy
import dataclasses
import json
import pickle
import re
import sys
import urllib.error
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import TINY, state_of
from torch import nn

import linear_eval
import reproduce
import train_baseline
import train_byol
from core.errors import UserError
from eval.trained import inherited_tables
from training.encoder import ENCODERS, Encoder, EncoderConfig, initialize, save_encoder
from training.weights import read_weights

META = {"arch": "resnet18", "stem": "small", "width": 0.125, "mean": [0.5] * 3, "std": [0.25] * 3}


def encoder(stem="small", width=0.125, seed=0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder("resnet18", stem, width)


CONFIG = EncoderConfig(stem="small", width=0.125)


def loaded_from(path, config=CONFIG) -> dict:
    """The state dict of the encoder that --ckpt `path` names."""
    return read_weights(path).encoder(config, f"--ckpt {path}").state_dict()


def same(state, other) -> bool:
    return state.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in state.items())


@pytest.fixture
def run(sample, recipe, tmp_path) -> Path:
    out = tmp_path / "run"
    train_byol.main(argv=["--recipe", recipe, "--out", str(out), "--quiet"])
    return out


class Statistics:
    """A data set's mean and standard deviation."""

    @staticmethod
    def statistics():
        return [0.1] * 3, [0.2] * 3


def test_everything_that_a_run_leaves_loads_equal(run, tmp_path):
    model = state_of(run, 10)["model"]
    trained = {k: model[f"encoder.{k}"] for k in encoder().state_dict()}
    torch.save(trained, tmp_path / "bare.pt")
    assert same(loaded_from(tmp_path / "bare.pt"), trained)
    assert not read_weights(tmp_path / "bare.pt").meta
    for path in (run, run / "encoder.pt", run / "checkpoints" / "step-00000010.pt"):
        assert same(loaded_from(path), trained), path
        weights = read_weights(path)
        assert weights.folder == run
        shared, recipe_tables = inherited_tables(weights)
        assert recipe_tables["finetune"]["steps"] == 5
        shape = {"arch": "resnet18", "stem": "small", "width": 0.125, "image_size": 0}
        assert shared["encoder"] == shape
        assert shared["data"]["crop_size"] == 16


def test_the_online_encoder_is_the_one_that_is_kept(run):
    model = state_of(run, 10)["model"]
    kept = loaded_from(run)["conv1.weight"]
    assert torch.equal(kept, model["encoder.conv1.weight"])
    assert not torch.equal(kept, model["target_encoder.conv1.weight"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", ""])
@pytest.mark.parametrize("wrapped", [False, True])
def test_C12_prefixes_are_taken_off(tmp_path, prefix, wrapped):
    state = encoder().state_dict()
    loaded = {prefix + k: v for k, v in state.items()}
    torch.save({"state_dict": loaded} if wrapped else loaded, tmp_path / "x.pt")
    assert same(loaded_from(tmp_path / "x.pt"), state)


def test_a_checkpoint_with_an_online_probe_loads(sample, recipe, tmp_path):
    out = tmp_path / "run"
    flags = ["--recipe", recipe, "--out", str(out), "--quiet", "--online-probe"]
    train_byol.main(argv=flags)
    assert same(loaded_from(out / "checkpoints" / "step-00000010.pt"), loaded_from(out))


def test_a_torchvision_classifier_loads_without_its_last_layer(tmp_path):
    theirs = torchvision.models.resnet18().state_dict()
    torch.save(theirs, tmp_path / "x.pth")
    del theirs["fc.weight"], theirs["fc.bias"]
    assert same(loaded_from(tmp_path / "x.pth", EncoderConfig()), theirs)


def sequential(state, numbers="014567"):
    """As nn.Sequential(*list(resnet.children())[:-1]) names it."""
    stages = dict(zip("conv1 bn1 layer1 layer2 layer3 layer4".split(), numbers, strict=True))
    parts = (name.split(".", 1) for name in state)
    return {f"{stages[a]}.{b}": state[f"{a}.{b}"] for a, b in parts}


def shortcuts(state):
    """As in networks for CIFAR: pytorch-cifar's, SupContrast's and lightly's."""
    return {name.replace("downsample", "shortcut"): value for name, value in state.items()}


def below(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def no_counters(state):
    return {name: value for name, value in state.items() if "num_batches" not in name}


def on_meta(state):
    return {name: value.to("meta") for name, value in state.items()}


ELSEWHERE = {  # what other libraries write: mine, and a second network that is not meant
    "lightly": lambda s, other: {
        **below("backbone.", sequential(s)),
        **below("backbone_momentum.", sequential(other)),
        "projection_head.layers.0.weight": torch.ones(2, 2),
    },
    "moco": lambda s, other: {
        "epoch": 3,
        "state_dict": {
            **below("module.encoder_q.", s),
            **below("module.encoder_k.", other),
            "module.encoder_q.fc.0.weight": torch.ones(2, 2),
            "module.queue": torch.ones(2),
        },
    },
    "solo-learn": lambda s, other: {
        "state_dict": below("backbone.", s) | below("momentum_backbone.", other)
    },
    "model": lambda s, other: {"model": below("net.trunk.", s)},
    "sequential": lambda s, other: sequential(s),
    "average alone": lambda s, other: below("teacher.backbone.", s),
    "swav": lambda s, other: {
        **below("module.", s),
        "module.projection_head.0.weight": torch.ones(2, 2),
        "module.prototypes.weight": torch.ones(2, 2),
    },
    "heads beside conv1": lambda s, other: {
        **s,
        "fc.0.weight": torch.ones(2, 2),
        "projector.weight": torch.ones(2),
    },
    "mmcv": lambda s, other: {"meta": {"epoch": 3, "arch": "r18"}, "state_dict": s},
    "meta like ours": lambda s, other: {
        "meta": {"arch": "ResNet", "mean": [0.5]},
        "model": below("encoder.", s),
        "config": {"lr": 1.0},
    },
    "args": lambda s, other: {**s, "args": {"lr": 0.1, "seeds": [1, 2]}, "epoch": 7},
    "twice": lambda s, other: {"state_dict": below("encoder.", s), "model": s},
    "byol-pytorch": lambda s, other: {
        **below("net.", s),
        **below("online_encoder.net.", s),
        **below("target_encoder.net.", other),
    },
    "camel": lambda s, other: {"model": s, "modelEma": other},
    "nested": lambda s, other: {"a": [{"b": ({"state_dict": below("net.", s)},)}], 3: "x"},
    "dino": lambda s, other: {
        "student": below("module.backbone.", s),
        "teacher": below("backbone.", other),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1.0}]},
    },
    "timm": lambda s, other: {"state_dict": s, "state_dict_ema": other, "arch": "resnet18"},
    "another shape beside it": lambda s, other: {
        "student": encoder(width=0.25).state_dict(),
        "teacher": s,
        "old": {k: v for k, v in other.items() if "layer4" not in k},
    },
    "pytorch-cifar": lambda s, other: {
        "net": {**below("module.", shortcuts(s)), "module.linear.weight": torch.ones(2, 2)},
        "acc": 93.1,
    },
    "lightly for CIFAR": lambda s, other: {  # no ReLU and no max-pool in between
        "state_dict": below("backbone.", sequential(shortcuts(s), "012345"))
        | {"projection_head.layers.0.weight": torch.ones(2, 2)},
    },
    "SimCLR for CIFAR": lambda s, other: {
        **below("f.", sequential(s, "013456")),
        **{f"g.{n}.weight": torch.ones(2) for n in range(8)},
    },
    "fastai": lambda s, other: {
        "model": below("0.", sequential(s)) | {"1.8.weight": torch.ones(2, 2)},
        "opt": {"state": [{"grad_avg": torch.ones(2)}], "hypers": [{"lr": 0.1}]},
    },
    "averages by other names": lambda s, other: {
        "EMAModel": other,
        "exponential_moving_average": other,
        "key_encoder": other,
        "polyak": other,
        "net": s,
    },
    "optimizer by name": lambda s, other: {
        "model": s,
        "optim": {
            key: {k: torch.ones_like(v) for k, v in s.items() if "running" not in k}
            for key in ("exp_avg", "exp_avg_sq")
        },
    },
    "an average without values": lambda s, other: {"model": s, "ema": on_meta(other)},
    "double": lambda s, other: {k: v.double() for k, v in s.items()},
    "half": lambda s, other: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "no counters": lambda s, other: {"ema": no_counters(other), "model": no_counters(s)},
}


@pytest.mark.parametrize("write", ELSEWHERE.values(), ids=ELSEWHERE)
def test_weights_of_other_libraries_are_found_below_their_prefix(tmp_path, write):
    mine, other = encoder(seed=1), encoder(seed=2)
    for network in (mine, other):  # exact in half precision too
        for value in network.state_dict().values():
            value.copy_(value.half() if value.is_floating_point() else value)
    torch.save(write(mine.state_dict(), other.state_dict()), tmp_path / "x.pth")
    assert same(loaded_from(tmp_path / "x.pth"), mine.state_dict())


def test_the_config_of_another_tool_beside_its_weights_is_not_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"config": ["resnet"]}')
    torch.save(encoder(seed=1).state_dict(), tmp_path / "pytorch_model.bin")
    assert same(loaded_from(tmp_path / "pytorch_model.bin"), encoder(seed=1).state_dict())


def test_a_deeper_resnet_is_not_taken_for_a_part_of_it(tmp_path):
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "x.pth")
    with pytest.raises(UserError, match='Unexpected key.*"layer1.2.conv1.weight"'):
        loaded_from(tmp_path / "x.pth", EncoderConfig())


def test_an_average_is_not_taken_where_the_trained_network_is_not_readable(tmp_path):
    state = encoder().state_dict()
    torch.save({"model": on_meta(state), "ema": state}, tmp_path / "x.pth")
    with pytest.raises(UserError, match='"conv1.weight", .* out of meta tensor'):
        loaded_from(tmp_path / "x.pth")


def test_an_encoder_of_a_fork_that_wraps_a_resnet_loads_whole(tmp_path, monkeypatch):
    fork = nn.ModuleDict({"backbone": encoder(), "neck": nn.Linear(2, 2)})
    monkeypatch.setitem(ENCODERS, "fork", lambda *shape: copy.deepcopy(fork))
    save_encoder(tmp_path / "encoder.pt", fork, META | {"arch": "fork"})
    config = dataclasses.replace(CONFIG, arch="fork")
    assert same(loaded_from(tmp_path / "encoder.pt", config), fork.state_dict())


def test_two_networks_of_equal_right_are_named(tmp_path):
    state = below("left.", encoder(seed=1).state_dict()) | below("right.", encoder().state_dict())
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth: holds several networks .*\(left, right\).*:right"):
        loaded_from(tmp_path / "x.pth")
    for name, seed in (("left", 1), ("right", 0), ("right.", 0)):
        assert same(loaded_from(f"{tmp_path}/x.pth:{name}"), encoder(seed=seed).state_dict()), name
    with pytest.raises(UserError, match="no network named middle with a tensor"):
        loaded_from(f"{tmp_path}/x.pth:middle")


def test_a_name_behind_a_colon_chooses_any_network_of_a_file(tmp_path):
    states = [encoder(seed=s).state_dict() for s in range(3)]
    content = {"state_dict": {**states[0], **below("teacher.net.", states[1])}, "x": states[2]}
    torch.save(content, tmp_path / "a:b.pth")
    for name, state in zip(("state_dict", "teacher", "x"), states, strict=True):
        assert same(loaded_from(f"{tmp_path}/a:b.pth:{name}"), state), name
    torch.save(states[0] | below("other.", states[1]), tmp_path / "y.pth")
    with pytest.raises(UserError, match=r"\(\., other\)"):
        loaded_from(tmp_path / "y.pth")
    assert same(loaded_from(f"{tmp_path}/y.pth:."), states[0])
    torch.save(below("other.", states[1]) | states[0], tmp_path / "z.pth")
    with pytest.raises(UserError, match=r"\(other, \.\).* as in FILE:\.$"):
        loaded_from(tmp_path / "z.pth")


def test_the_target_network_of_a_checkpoint_by_name(run):
    path = run / "checkpoints" / "step-00000010.pt"
    model = state_of(run, 10)["model"]
    found = loaded_from(f"{path}:target_encoder")["conv1.weight"]
    assert torch.equal(found, model["target_encoder.conv1.weight"])


def test_safetensors_load_with_and_without_our_meta_data(tmp_path):
    from safetensors.torch import save_file

    state = encoder(seed=1).state_dict()
    save_file(below("backbone.", state), tmp_path / "a.safetensors", metadata={"format": "pt"})
    ours = {k: json.dumps(v) for k, v in META.items()}
    save_file(dict(state), tmp_path / "b.safetensors", metadata=ours)
    for name in "ab":
        assert same(loaded_from(tmp_path / f"{name}.safetensors"), state)
    assert read_weights(tmp_path / "b.safetensors").meta == META
    (tmp_path / "c.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(UserError, match="c.safetensors: no checkpoint"):
        read_weights(tmp_path / "c.safetensors")


def test_safetensors_without_its_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "x.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(UserError, match="x.safetensors: needs the package safetensors: pip"):
        read_weights(tmp_path / "x.safetensors")


class Foreign:
    """A class of somebody's training code."""


REFUSED = {
    "object": ({"state_dict": {}, "cfg": Foreign()}, r"test_weights\.Foreign"),
    "path": ({"args": {"out": Path("x")}}, "PosixPath"),
    "module": (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    "numpy": ({"best": np.float64(3)}, "numpy.*scalar"),
}


@pytest.mark.parametrize("content, name", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_refused_is_named_with_the_way_out(tmp_path, content, name, zipped):
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "x.pth", "--init")
    text = str(error.value)
    assert re.search(rf"{name}, ", text) and "torch.save(model.state_dict(), 'weights.pth')" in text
    assert text.startswith(f"--init {tmp_path}/x.pth: ") and "of this project" not in text


MISTAKES = {
    "missing": ("bn1.weight", lambda v: None, 'Missing key.*"bn1.weight"'),
    "extra": ("layer1.more", lambda v: torch.ones(1), 'Unexpected key.*"layer1.more"'),
    "shape": ("bn1.bias", lambda v: torch.ones(3), "size mismatch for bn1.bias"),
    "not finite": ("bn1.bias", lambda v: v / 0, "bn1.bias is not finite"),
    "too large": ("conv1.weight", lambda v: v.double() * 1e300, "conv1.weight is not finite"),
    "sparse": ("conv1.weight", lambda v: v.to_sparse(), '"conv1.weight"'),
    "without values": ("conv1.weight", lambda v: v.to("meta"), '"conv1.weight"'),
    "integers": ("conv1.weight", lambda v: v.to(torch.int8), "conv1.weight holds torch.int8"),
    "complex": ("conv1.weight", lambda v: v.to(torch.complex64), "conv1.weight holds torch.comp"),
    "quantized": (
        "conv1.weight",
        lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
        "conv1.weight holds torch.qint8",
    ),
    "another width": (
        "conv1.weight",
        lambda v: torch.ones(16, 3, 3, 3),
        r"conv1.weight: .*\[16, 3, 3, 3\].*\[8, 3, 3, 3\]",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key, change, text", MISTAKES.values(), ids=MISTAKES)
def test_C11_C13_what_does_not_fit_is_one_line_that_names_it(tmp_path, key, change, text):
    state = encoder().state_dict()
    state[key] = change(state.get(key))
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"^--ckpt {tmp_path}/x.pt.*{text}") as error:
        loaded_from(tmp_path / "x.pt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


OTHER_TOOLS = {
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "gguf": b"GGUF" + bytes(400),
    "pickle": pickle.dumps({"conv1.weight": torch.ones(2)}),
    "pickled numpy": pickle.dumps({"model": {"conv1.weight": np.ones(2)}}),
}


@pytest.mark.parametrize("content", OTHER_TOOLS.values(), ids=OTHER_TOOLS)
@pytest.mark.filterwarnings("ignore")  # torch's, about pickle protocols
def test_files_of_other_tools_are_one_line(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pth: no checkpoint, or damaged"):
        read_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [{"a": 1}, {}, [1, 2], torch.ones(2), {"state_dict": {}}])
def test_files_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt: no (checkpoint|network with)"):
        loaded_from(tmp_path / "x.pt")


def test_C9_a_folder_without_encoder_and_a_missing_path(tmp_path):
    with pytest.raises(UserError, match="no encoder.pt in it"):
        read_weights(tmp_path)
    with pytest.raises(UserError, match="--init .*nothing"):
        read_weights(tmp_path / "nothing", "--init")


def test_init_from_a_file_brings_weights_and_normalisation(tmp_path):
    source, path = encoder(seed=3), tmp_path / "encoder.pt"
    save_encoder(path, source, META)
    config = EncoderConfig(stem="small", width=0.125, init=str(path))
    target, *normalization = initialize(config, Statistics)
    assert normalization == [[0.5] * 3, [0.25] * 3]
    assert same(target.state_dict(), source.state_dict())
    # stl, cifar and small have equal shapes: the file says which one it is
    with pytest.raises(UserError, match="--stem small, not cifar"):
        initialize(EncoderConfig(stem="cifar", width=0.125, init=str(path)), Statistics)


def test_init_random_keeps_the_datas_normalisation():
    config = EncoderConfig(stem="small", width=0.125)
    torch.manual_seed(5)
    target, *normalization = initialize(config, Statistics)
    assert normalization == [[0.1] * 3, [0.2] * 3]
    assert same(target.state_dict(), encoder(seed=5).state_dict())


# --init imagenet


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty torch cache, and no network."""

    def offline(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    return tmp_path / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"


@pytest.fixture
def cached(cache) -> dict:
    """A file where torchvision looks for its ImageNet weights, in their format."""
    torch.manual_seed(11)
    network = torchvision.models.resnet18()
    # as published: parameters, not tensors, and no counters, which torch did not have then
    state = OrderedDict(network.named_parameters())
    state |= {k: v for k, v in network.named_buffers() if "num_batches_tracked" not in k}
    assert len(state) == 102
    cache.parent.mkdir(parents=True)
    torch.save(state, cache)
    return state


IMAGENET = (
    "--stem imagenet --width 1 --init imagenet --batch-size 4 --steps 1 --lr 0 --quiet"
).split()


@pytest.mark.parametrize("script", [train_byol, train_baseline])
def test_init_imagenet_starts_from_torchvisions_cache(sample, recipe, tmp_path, cached, script):
    out = tmp_path / "run"
    script.main(argv=["--recipe", recipe, "--out", str(out), *IMAGENET])
    weights = read_weights(out)
    weight = loaded_from(out, EncoderConfig())["layer4.1.conv2.weight"]
    assert torch.equal(weight, cached["layer4.1.conv2.weight"])
    assert weights.meta["mean"] == [0.485, 0.456, 0.406]
    assert weights.meta["std"] == [0.229, 0.224, 0.225]
    assert weights.meta["init"] == "imagenet"


@pytest.mark.parametrize("script", [train_byol, train_baseline])
def test_offline_and_not_cached_says_where_the_file_goes(
    sample, recipe, tmp_path, cache, script, capsys
):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        script.main(argv=["--recipe", recipe, "--out", str(out), *IMAGENET])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1
    assert str(cache) in text and "https://download.pytorch.org" in text
    assert not out.exists()


@pytest.mark.parametrize("flags", [["--stem", "stl"], ["--width", "0.5"]])
def test_imagenet_weights_fit_one_stem_and_width(sample, recipe, tmp_path, cached, flags, capsys):
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        train_byol.main(argv=["--recipe", recipe, "--out", str(out), *IMAGENET, *flags])
    assert "--init imagenet needs --stem imagenet --width 1" in capsys.readouterr().err


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_C10_a_malicious_file_in_the_cache_is_not_run(cache, tmp_path):
    cache.parent.mkdir(parents=True)
    torch.save({"a": Evil(tmp_path / "sentinel")}, cache)
    with pytest.raises(UserError):
        initialize(EncoderConfig(init="imagenet"), Statistics)
    assert not (tmp_path / "sentinel").exists()


def test_bare_weights_need_their_shape_on_the_command_line(sample, run, tmp_path, capsys):
    torch.save(loaded_from(run), tmp_path / "bare.pt")
    flags = "--dataset sample --linear.strength 0.1 --threads 1 --device cpu --quiet".split()
    flags += ["--ckpt", str(tmp_path / "bare.pt")]
    with pytest.raises(SystemExit) as stop:
        linear_eval.main(flags)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "--width" in text and text.count("\n") == 1
    result = linear_eval.main([*flags, "--stem", "small", "--width", "0.125"])
    assert result["test_images"] == 100


def test_the_table_of_both_starts_has_the_imagenet_control(sample, tmp_path, cached):
    path = tmp_path / "both.toml"
    text = TINY.replace('stem = "small"', 'stem = "imagenet"').replace("width = 0.125", "width = 1")
    text = text.replace("steps = 10", "steps = 1").replace("batch_size = 64", "batch_size = 4")
    text = text.replace("budgets = [20, 40]", "budgets = [20]").replace("draws = 2", "draws = 1")
    path.write_text(text + 'inits = ["random", "imagenet"]\n')
    reproduce.main(argv=["--recipe", str(path), "--out", str(tmp_path / "table"), "--quiet"])
    rows = json.loads((tmp_path / "table" / "results.json").read_text())
    found = {(r["name"], r["init"]) for r in rows}
    both = {"baseline", "byol-knn", "byol-linear", "byol-mlp", "byol-finetune"}
    assert found == {(n, i) for n in both for i in ("random", "imagenet")} | {
        ("raw-pixels", "none"),
        ("random-encoder", "none"),
        ("imagenet-features", "imagenet"),
    }
    claims = json.loads((tmp_path / "table" / "claims.json").read_text())
    assert {c["init"] for c in claims} == {"random", "imagenet"}


def test_a_table_without_its_weights_says_so_before_any_row(sample, tmp_path, cache, capsys):
    path = tmp_path / "both.toml"
    text = TINY.replace('stem = "small"', 'stem = "imagenet"').replace("width = 0.125", "width = 1")
    path.write_text(text + 'inits = ["imagenet"]\n')
    with pytest.raises(SystemExit) as stop:
        reproduce.main(argv=["--recipe", str(path), "--out", str(tmp_path / "table")])
    assert stop.value.code == 2 and str(cache) in capsys.readouterr().err
    assert not (tmp_path / "table" / "cells.jsonl").exists()
