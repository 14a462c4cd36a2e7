"""torchvision's other classifiers as encoders: built, trained, resumed, evaluated, exported."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import forked
import pytest
import torch
from conftest import metrics, trained
from torch import nn
from torchvision import models

import finetune
import linear_eval
import reproduce
import train_baseline
import train_byol
from core.errors import UserError
from data.datasets import DataConfig
from eval import export
from eval.trained import load
from training.encoder import (
    ENCODERS,
    EncoderConfig,
    build_encoder,
    check_sizes,
    initialize,
    save_encoder,
)
from training.weights import imagenet_file, published_inputs, read_weights

CLASSIFIERS = list(ENCODERS)


def without_values(arch: str) -> nn.Module:
    """The encoder on the meta device; RegNets are built in memory that nobody writes."""
    if not arch.startswith("regnet"):
        with torch.device("meta"):
            return build_encoder(EncoderConfig(arch))
    with contextlib.ExitStack() as stack:
        for name in ("kaiming_uniform_", "uniform_", "normal_", "ones_", "zeros_"):
            stack.enter_context(mock.patch.object(nn.init, name))
        return build_encoder(EncoderConfig(arch)).to("meta")


def test_all_of_torchvisions_classifiers_but_two_are_there():
    others = set(models.list_models(module=models)) - set(ENCODERS)
    assert others == {"squeezenet1_0", "squeezenet1_1"}
    assert len(CLASSIFIERS) == len(set(CLASSIFIERS)) == 78


@pytest.mark.parametrize("arch", CLASSIFIERS)
def test_gradients_reach_every_parameter_and_features_have_their_size(arch):
    """DistributedDataParallel waits for the gradient of every parameter."""
    encoder, x = without_values(arch), torch.zeros(2, 3, 224, 224, device="meta")
    encoder(x).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        assert encoder.eval()(x).shape == (2, encoder.feature_size)


SHAPE = "--stem imagenet --width 1 --crop-size 32 --eval-size 32".split()
RUN = "--steps 2 --batch-size 8 --optimizer sgd --lr 0.01 --log-every 1 --quiet".split()
slow = pytest.mark.slow
# maxvit_t (with --crop-size 224 --eval-size 224) and vgg11 pass too, but take three minutes
FAMILIES = {
    "densenet121": [],
    "efficientnet_b0": [],
    "googlenet": [],
    "mnasnet0_5": [],
    "mobilenet_v2": [],
    "mobilenet_v3_small": [],
    "regnet_y_400mf": [],
    "shufflenet_v2_x0_5": [],
    "alexnet": ["--crop-size", "64", "--eval-size", "64"],
    "convnext_tiny": [],
    "efficientnet_v2_s": [],
    "inception_v3": ["--crop-size", "75", "--eval-size", "75"],
    "swin_t": [],
    "swin_v2_t": [],
    "vit_b_32": ["--image-size", "32"],
}
SLOW = list(FAMILIES)[8:]


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=slow if a in SLOW else ()) for a in FAMILIES]
)
def test_each_family_trains_resumes_bit_for_bit_and_is_evaluated(sample, recipe, tmp_path, arch):
    """Dropout and stochastic depth draw the same numbers after a resume."""
    flags = ["--recipe", recipe, *SHAPE, *RUN, "--arch", arch, *FAMILIES[arch], "--out"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    train_byol.main(argv=[*flags, str(whole)])
    train_byol.main(argv=[*flags, str(out), "--stop-after", "1"])
    train_byol.main(argv=[*flags, str(out), "--resume"])
    assert trained(out, 2) == trained(whole, 2) and metrics(out) == metrics(whole)
    result = linear_eval.main(["--ckpt", str(out), "--linear.strength", "0.1", "--quiet"])
    assert result["test_images"] == 100
    file = tmp_path / "e.safetensors"
    flags = ["--ckpt", str(out), "--format", "safetensors", "--out", str(file)]
    assert export.main(flags)["difference"] == 0
    encoder, transform = load(file)
    assert not encoder.training and transform == load(out)[1]


def test_two_processes_train_a_network_with_dropout(sample, recipe, tmp_path):
    flags = ["--recipe", recipe, *SHAPE, *RUN, "--arch", "mobilenet_v3_small", "--out"]
    forked.run(train_byol.main, train_byol.BYOL, [*flags, str(tmp_path / "run")], ranks=2)
    assert metrics(tmp_path / "run")[-1]["step"] == 1


def test_dropout_is_on_in_training_and_off_in_evaluation(sample, recipe, tmp_path, monkeypatch):
    drawn, dropout = [], nn.functional.dropout

    def watched(x, p, training, inplace):
        if x.device.type != "meta":  # where sizes are tried
            drawn.append(training)
        return dropout(x, p, training, inplace)

    monkeypatch.setattr(nn.functional, "dropout", watched)
    flags = ["--recipe", recipe, *SHAPE, *RUN, "--arch", "mobilenet_v3_small"]
    train_byol.main(argv=[*flags, "--out", str(tmp_path / "run")])
    assert drawn.count(True) > 1 and drawn.count(False) == 1  # by `measure_statistics`
    drawn.clear()
    linear_eval.main(["--ckpt", str(tmp_path / "run"), "--linear.strength", "0.1", "--quiet"])
    assert drawn and not any(drawn)


# batch norm


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "mnasnet0_5"])
def test_a_new_network_has_the_statistics_of_images(sample, arch):
    """Else its features are 1e-9 in eval mode: no control, and a collapse at the start."""
    encoder = EncoderConfig(arch)
    before = train_byol.start(encoder, DataConfig(), sample.train, seed=0)[0], torch.get_rng_state()
    torch.manual_seed(0)
    fresh = build_encoder(encoder)
    assert torch.equal(before[1], torch.get_rng_state()) and before[0].training
    for (name, value), other in zip(before[0].named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(value, other), name
    x = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert before[0].eval()(x).std(0).mean() > 1e-3 > fresh.eval()(x).std(0).mean()


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "mnasnet0_5", "efficientnet_b5"])
def test_running_statistics_follow_within_fifty_steps(arch):
    """torchvision's momentum of some, 0.01 or 0.0003, suits long runs alone."""
    encoder = ENCODERS[arch]()
    name, norm = next((n, m) for n, m in encoder.named_modules() if isinstance(m, nn.BatchNorm2d))
    x = torch.randn(8, norm.num_features, 4, 4) + 5
    for _ in range(50):
        norm(x)
    assert norm.running_mean.mean() > 4.9, name


def test_a_size_that_never_fits_is_told_before_the_data_are_fetched(tmp_path, capsys):
    flags = ["--arch", "vit_b_16", "--crop-size", "32", "--data-root", str(tmp_path), "--download"]
    with pytest.raises(SystemExit):
        train_byol.main(argv=[*flags, "--out", str(tmp_path / "run")])
    text = "--arch vit_b_16: takes images of 224 pixels; add --crop-size 224 or --image-size 32"
    assert text in capsys.readouterr().err and not any(tmp_path.iterdir())


# sizes of images


def size_of(crop: int):
    return SimpleNamespace(crop=crop, stored=0)


FIT = {"alexnet": (63, 62), "inception_v3": (75, 74), "densenet121": (29, 28), "vgg11": (32, 31),
       "maxvit_t": (224, 192), "vit_b_32": (224, 256)}  # fmt: skip


@pytest.mark.parametrize("arch", FIT)
def test_sizes_are_tried_without_a_trace(arch):
    """torchvision's `min_size` of each network; the random numbers and the network stay."""
    fits, fails = FIT[arch]
    encoder, before = ENCODERS[arch](), torch.get_rng_state()
    state = {name: (value.clone(), value._version) for name, value in encoder.state_dict().items()}
    check_sizes(encoder, size_of(fits), [fits])
    tries = {"--eval-size": (size_of(fails),), "--crop-size": (size_of(fits), [fits, fails])}
    for flag, sizes in tries.items():
        text = f"--arch {arch}: can't take images of {fails} pixels .*change {flag}"
        with pytest.raises(UserError, match=text) as error:
            check_sizes(encoder, *sizes)
        assert "\n" not in str(error.value)
    assert torch.equal(before, torch.get_rng_state()) and encoder.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, state[name][0]) and value._version == state[name][1], name


@pytest.mark.parametrize("script", [train_byol, train_baseline])
@pytest.mark.parametrize(
    "flags, side, flag",
    [
        ("--arch alexnet --crop-size 32", 32, "--crop-size"),
        ("--arch vit_b_16 --image-size 16 --crop-size 16", 28, "--eval-size"),  # whole images
    ],
)
def test_a_size_that_does_not_fit_is_one_line_before_training(
    sample, recipe, tmp_path, capsys, script, flags, side, flag
):
    out = tmp_path / "run"
    flags = ["--recipe", recipe, *SHAPE[:4], *flags.split(), "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        script.main(argv=[*flags, "--batch-size", "8"])
    *warnings, text = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and not out.exists()
    assert f"can't take images of {side} pixels" in text and f"change {flag}" in text
    assert all("enlarged" in warning for warning in warnings)


@pytest.mark.parametrize(
    "sizes, side", [("--crop-size 24", 24), ("--crop-size 16 --eval-size 32", 16)]
)
def test_a_table_says_so_before_any_row(sample, recipe, tmp_path, capsys, sizes, side):
    out, flags = tmp_path / "table", ["--recipe", recipe, *SHAPE[:4], "--arch", "densenet121"]
    with pytest.raises(SystemExit) as stop:
        reproduce.main([*flags, *sizes.split(), "--out", str(out)])
    assert stop.value.code == 2 and not out.exists()
    assert f"can't take images of {side} pixels" in capsys.readouterr().err


def test_small_crops_of_a_method_are_tried_too(sample, recipe, tmp_path, capsys):
    from variants.dino import DINO

    flags = ["--recipe", recipe, *SHAPE, *RUN, "--arch", "densenet121", "--dino.local-size", "16"]
    with pytest.raises(SystemExit):
        train_byol.main(DINO, [*flags, "--out", str(tmp_path / "run")])
    assert "can't take images of 16 pixels" in capsys.readouterr().err


@pytest.fixture
def densenet(tmp_path) -> str:
    """The encoder.pt of a run on images of 32 pixels."""
    config = EncoderConfig("densenet121")
    meta = config.shape | {"mean": [0.5] * 3, "std": [0.25] * 3, "stored": 28, "frame": [32, 32]}
    save_encoder(tmp_path / "encoder.pt", build_encoder(config), meta)
    return str(tmp_path / "encoder.pt")


@pytest.mark.parametrize("script", [linear_eval, finetune])
@pytest.mark.parametrize(
    "sizes, side", [("--crop-size 24", 24), ("--crop-size 16 --eval-size 32", 16)]
)
def test_evaluations_try_their_size(
    sample, recipe, tmp_path, capsys, densenet, script, sizes, side
):
    flags = ["--ckpt", densenet, "--recipe", recipe, *SHAPE[:4], *sizes.split(), "--quiet"]
    with pytest.raises(SystemExit) as stop:
        script.main([*flags, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert f"densenet121: can't take images of {side} pixels" in capsys.readouterr().err


def test_an_image_size_is_the_networks(tmp_path):
    config = EncoderConfig("vit_b_32", image_size=64)
    with torch.device("meta"):
        encoder = build_encoder(config)
        assert encoder.encoder.pos_embedding.shape == (1, 5, 768)
        check_sizes(encoder, size_of(64))
        assert build_encoder(EncoderConfig("maxvit_t", image_size=448)).feature_size == 512
        for arch in ("vit_b_32", "maxvit_t"):
            with pytest.raises(UserError, match=rf"--image-size 50: not for --arch {arch} \("):
                build_encoder(EncoderConfig(arch, image_size=50))
    meta = config.shape | {"mean": [0.5] * 3, "std": [0.5] * 3}
    torch.save({"state_dict": {"x": torch.ones(1)}, "meta": meta}, tmp_path / "encoder.pt")
    with pytest.raises(UserError, match="made with --image-size 64, not 96"):
        other = EncoderConfig("vit_b_32", image_size=96)
        read_weights(tmp_path / "encoder.pt").encoder(other, "--ckpt x")


# published weights


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def as_published(arch: str, state: dict) -> dict:
    """With the names of the files that torchvision published before it changed them."""
    old = {"densenet": ("norm1", "norm.1", "norm2", "norm.2", "conv1", "conv.1", "conv2", "conv.2"),
           "vit_b_32": (".mlp.0.", ".mlp.linear_1.", ".mlp.3.", ".mlp.linear_2.")}  # fmt: skip
    pairs = old.get(arch[:8], ())
    renamed = {}
    for name, value in state.items():
        if "denselayer" in name or "encoder_layer" in name:
            for new, before in zip(pairs[::2], pairs[1::2], strict=True):
                name = name.replace(new, before)
        renamed[name] = value
    return renamed


PUBLISHED = ["densenet121", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v3_small",
             "regnet_y_400mf", "shufflenet_v2_x0_5", "vit_b_32"]  # fmt: skip


@pytest.mark.parametrize("arch", PUBLISHED)
def test_init_imagenet_computes_what_torchvisions_network_does(cache, arch):
    """Inputs from its own transforms, and transform_input as its own loading sets it."""
    weights = models.get_model_weights(arch).IMAGENET1K_V1
    two = arch in ("googlenet", "inception_v3")
    more = dict(init_weights=True, transform_input=True) if two else {}
    torch.manual_seed(0)
    theirs = models.get_model(arch, **more)
    for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0  # else half of the networks answer 0 to everything
    (side,), transforms = weights.transforms().crop_size, weights.transforms()
    x = torch.rand(2, 3, side, side)
    theirs(normalized(x, transforms.mean, transforms.std))
    theirs.eval()
    torch.save(as_published(arch, theirs.state_dict()), cache / weights.url.split("/")[-1])
    last = [name for name, layer in theirs.named_modules() if isinstance(layer, nn.Linear)][-1]
    theirs.set_submodule(last, nn.Identity())

    encoder, mean, std = initialize(EncoderConfig(arch, init="imagenet"), None)
    with torch.no_grad():
        expected = theirs(normalized(x, transforms.mean, transforms.std))
        found = encoder.eval()(normalized(x, mean, std))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(expected.unique()) > 100


def normalized(x, mean, std):
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize("arch", ENCODERS)
def test_the_inputs_of_published_weights_are_torchvisions(arch):
    versions = models.get_model_weights(arch).__members__
    first = "IMAGENET1K_SWAG_E2E_V1" if arch in ("regnet_y_128gf", "vit_h_14") else "IMAGENET1K_V1"
    transforms, meta = versions[first].transforms(), published_inputs(arch)
    assert meta["frame"] == [*transforms.resize_size, *transforms.crop_size]
    if arch not in ("googlenet", "inception_v3"):
        assert (meta["mean"], meta["std"]) == (transforms.mean, transforms.std)


def test_networks_without_a_first_version_take_what_is_published(cache):
    def file_of(arch, **more):
        with mock.patch("torch.hub.download_url_to_file") as download:
            imagenet_file(EncoderConfig(arch, init="imagenet", **more))
        return download.call_args.args[0].split("/")[-1]

    assert file_of("regnet_y_128gf") == "regnet_y_128gf_swag-c8ce3e52.pth"
    assert file_of("vit_h_14", image_size=518) == "vit_h_14_swag-80465313.pth"
    assert file_of("vit_b_16") == file_of("vit_b_16", image_size=224) == "vit_b_16-c867db91.pth"
    for arch, size, needed in (("vit_h_14", 0, 518), ("vit_b_16", 64, 224)):
        with pytest.raises(UserError, match=f"--arch {arch} needs --image-size {needed}"):
            file_of(arch, image_size=size)


def test_only_the_last_layer_may_be_too_much(tmp_path):
    state, config = models.mobilenet_v3_small().state_dict(), EncoderConfig("mobilenet_v3_small")
    torch.save({"model": {f"net.{k}": v for k, v in state.items()}}, tmp_path / "x.pth")
    for name in ("x.pth", "x.pth:net"):
        encoder = read_weights(tmp_path / name).encoder(config, "--ckpt x")
        for key, value in encoder.state_dict().items():
            assert torch.equal(value, state[key])
    for extra in ("classifier.2.weight", "classifier.30.weight", "features.13.weight"):
        torch.save(state | {extra: torch.ones(3)}, tmp_path / "y.pth")
        with pytest.raises(UserError, match=f'Unexpected key.*"{extra}"'):
            read_weights(tmp_path / "y.pth").encoder(config, "--ckpt y")
    del state["features.12.0.weight"]
    torch.save(state, tmp_path / "z.pth")
    with pytest.raises(UserError, match='Missing key.*"features.12.0.weight"'):
        read_weights(tmp_path / "z.pth").encoder(config, "--ckpt z")


def test_the_start_line_names_options_that_the_network_has():
    assert str(EncoderConfig("resnet34", "stl", 0.5)) == "resnet34, stem stl, width 0.5"
    assert str(EncoderConfig("swin_t")) == "swin_t"


def test_help_does_not_list_eighty_names(capsys):
    with pytest.raises(SystemExit):
        train_byol.main(argv=["--help"])
    text = capsys.readouterr().out
    assert "--arch ARCH" in text and "--stem imagenet|stl|cifar|small" in text
    assert "convnext" not in text
