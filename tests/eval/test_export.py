"""Export to other formats; skipped where their packages are not installed."""

import json
import sys

import pytest
import torch

from eval import export
from eval.trained import load
from training.encoder import Encoder, save_encoder
from training.weights import read_weights


def features_of(run, images):
    """Features of `images` by the run's encoder, as evaluations compute them."""
    encoder, transform = load(run)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.mean, transform.std))
    with torch.no_grad():
        return encoder((images - mean) / std)


@pytest.fixture
def images():
    return torch.rand(5, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def test_safetensors_holds_the_state_dict_and_what_its_inputs_need(trained_run, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    out = tmp_path / "e.safetensors"
    flags = ["--ckpt", str(trained_run), "--format", "safetensors", "--out", str(out)]
    assert export.main(flags)["difference"] == 0
    weights = read_weights(trained_run)
    with safetensors.safe_open(out, "pt") as file:
        meta = {k: json.loads(v) for k, v in file.metadata().items()}
        assert meta["mean"] == weights.meta["mean"] and meta["arch"] == "resnet18"
        state = torch.load(trained_run / "encoder.pt", weights_only=True)["state_dict"]
        assert set(file.keys()) == set(state)
        assert all(torch.equal(file.get_tensor(k), v) for k, v in state.items())


def test_onnx_gives_the_same_features_for_any_batch(trained_run, tmp_path, images):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "e.onnx"
    export.main(["--ckpt", str(trained_run), "--format", "onnx", "--out", str(out)])
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        (found,) = session.run(None, {"images": images[:count].numpy()})
        expected = features_of(trained_run, images[:count])
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["stem"]) == "small"


def test_a_difference_is_an_error_and_leaves_no_file(trained_run, tmp_path, capsys, monkeypatch):
    def wrong(path, network, meta, images):
        path.write_text("something")
        return network(images) + 1

    monkeypatch.setitem(export.FORMATS, "onnx", wrong)
    out = tmp_path / "e.onnx"
    with pytest.raises(SystemExit) as stop:
        export.main(["--ckpt", str(trained_run), "--format", "onnx", "--out", str(out)])
    assert stop.value.code == 1 and not out.exists()
    assert "features differ by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, package", [("safetensors", "safetensors.torch"), ("onnx", "onnxruntime")]
)
def test_a_missing_package_is_one_line(trained_run, tmp_path, capsys, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "e"
    with pytest.raises(SystemExit) as stop:
        export.main(["--ckpt", str(trained_run), "--format", name, "--out", str(out)])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and not out.exists()
    assert f"--format {name}" in error[0] and "pip install -r eval/requirements.txt" in error[0]


def test_an_existing_file_is_kept(trained_run, tmp_path, capsys):
    out = tmp_path / "e"
    out.write_text("mine")
    with pytest.raises(SystemExit):
        export.main(["--ckpt", str(trained_run), "--format", "onnx", "--out", str(out)])
    assert out.read_text() == "mine" and "name another file" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_encoder_pt_loads_into_other_libraries_networks(tmp_path, library):
    """Stem imagenet, width 1: only the last layer is missing, and the features are the same."""
    networks = pytest.importorskip(f"{library}.models" if library == "torchvision" else library)
    make = (
        networks.resnet18 if library == "torchvision" else lambda: networks.create_model("resnet18")
    )
    torch.manual_seed(0)
    encoder = Encoder("resnet18").eval()
    save_encoder(tmp_path / "encoder.pt", encoder, {})
    state = torch.load(tmp_path / "encoder.pt", weights_only=True)["state_dict"]
    theirs = make().eval()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert set(missing) == {"fc.weight", "fc.bias"} and not unexpected
    theirs.fc, x = torch.nn.Identity(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), encoder(x), rtol=1e-4, atol=1e-4)
