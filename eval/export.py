"""A pretrained encoder for other programs; what was written is read again and compared.

python -m eval.export --ckpt runs/byol-mine --format safetensors --out encoder.safetensors
python -m eval.export --ckpt runs/byol-mine --format onnx --out encoder.onnx

safetensors holds the state dict by torchvision's names, and its meta data as text.  ONNX takes
images (B, 3, S, S) in 0..1, as evaluation frames them, and gives features (B, D): normalisation is
included.  Packages: eval/requirements.txt.  encoder.pt needs none of it, its state_dict has
torchvision's names.
"""

import json
from pathlib import Path

import torch
from torch import nn

from core.errors import RunError, UserError
from core.files import new_file
from data.transform import EvalTransform
from eval.trained import command, from_weights, parser
from training.weights import read_weights

TOLERANCE = 1e-4  # of the largest feature


class Normalized(nn.Module):
    """Images in 0..1 to features."""

    def __init__(self, encoder: nn.Module, transform: EvalTransform) -> None:
        super().__init__()
        self.encoder = encoder.to(memory_format=torch.contiguous_format)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(transform, name)).view(3, 1, 1))

    def forward(self, images):
        return self.encoder((images - self.mean) / self.std)


def to_safetensors(path: Path, network: Normalized, meta: dict, images: torch.Tensor):
    """Write the file; the features of `images` by an encoder that was loaded from it."""
    from safetensors.torch import load_file, save_file

    state = {k: v.contiguous() for k, v in network.encoder.state_dict().items()}
    save_file(state, path, metadata={k: json.dumps(v) for k, v in meta.items()})
    for value in state.values():
        value.zero_()  # what is not in the file is not compared
    network.encoder.load_state_dict(load_file(path))
    return network(images)


def to_onnx(path: Path, network: Normalized, meta: dict, images: torch.Tensor):
    """Write the file; the features of `images` by ONNX's own runtime."""
    import onnx
    import onnxruntime

    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(
        network, (images,), input_names=["images"], output_names=["features"],
        dynamic_shapes=shapes, dynamo=True, verbose=False,
    )  # fmt: skip
    model = program.model_proto
    onnx.helper.set_model_props(model, {k: json.dumps(v) for k, v in meta.items()})
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


FORMATS = {"safetensors": to_safetensors, "onnx": to_onnx}


@torch.no_grad()
def run(given) -> dict:
    """Write and check; returns the largest difference, as a part of the largest feature."""
    out = new_file(given.out or f"encoder.{given.format}")
    weights = read_weights(given.ckpt)
    encoder, transform = from_weights(weights, f"--ckpt {given.ckpt}", "cpu")
    network, size = Normalized(encoder, transform).eval(), transform.crop or transform.stored
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = network(images).clone()
    meta = weights.meta | {"mean": transform.mean, "std": transform.std}
    part = out.with_name(f"{out.name}.partial")  # `out` is there only when it was compared
    try:
        found = FORMATS[given.format](part, network, meta, images)
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference < TOLERANCE:
            raise RunError(f"--format {given.format}: features differ by {difference:.1e}")
        part.rename(out)
    except ImportError as error:
        text = f"--format {given.format}: {error}; pip install -r eval/requirements.txt"
        raise UserError(text) from None
    finally:
        part.unlink(missing_ok=True)
    print(f"{out}: {expected.shape[1]} features, read again: differences up to {difference:.1e}")
    return {"difference": difference}


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    arguments = parser(__doc__, device=False)
    arguments.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    arguments.add_argument("--out", help="file to write [encoder.FORMAT]")
    return command(run, arguments, argv)


if __name__ == "__main__":
    main()
