"""Export a pretrained encoder for other programs, and verify the file.

python -m eval.export --ckpt runs/byol-mine --format safetensors --out encoder.safetensors
python -m eval.export --ckpt runs/byol-mine --format onnx --out encoder.onnx

safetensors holds the state dict with torchvision's names, and metadata as JSON.  onnx takes images
(B, 3, S, S) in 0..1, resized and cropped as in evaluation, normalizes them and returns features
(B, D).  Packages: eval/requirements.txt.  encoder.pt needs none: its state_dict has torchvision's
names too.
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from core.errors import RunError, UserError
from core.files import new_file
from eval.trained import command, from_weights, parser
from training.weights import load_state, read_weights

TOLERANCE = 1e-4  # largest difference, relative to the largest feature


class Normalize(nn.Module):
    """(images - mean) / std as a layer; torch.export does not accept torchvision's."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def to_safetensors(file: Path, network: nn.Module, meta: dict[str, str], images: Tensor) -> Tensor:
    """Write the encoder; returns the features of `images` with the weights in the file."""
    from safetensors.torch import load_file, save_file  # an optional extra

    _, encoder = network
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, file, metadata=meta)
    load_state(encoder, load_file(file), str(file), "the encoder")
    return network(images)


def to_onnx(file: Path, network: nn.Module, meta: dict[str, str], images: Tensor) -> Tensor:
    """Write the network; returns the features of `images` by ONNX Runtime from the file."""
    import onnxruntime  # an optional extra

    names = dict(input_names=["images"], output_names=["features"])
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(network, (images,), dynamic_shapes=shapes, verbose=False, **names)
    program.model.metadata_props.update(meta)
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


FORMATS = {"safetensors": to_safetensors, "onnx": to_onnx}


@torch.no_grad()
def run(args) -> dict:
    """Write and verify the file; returns the difference as TOLERANCE defines it."""
    out = new_file(args.out or f"encoder.{args.format}")
    weights = read_weights(args.ckpt)
    encoder, transform = from_weights(weights, f"--ckpt {args.ckpt}", "cpu")
    normalize = Normalize(transform.mean, transform.std)
    network = nn.Sequential(normalize, encoder).eval().to(memory_format=torch.contiguous_format)
    size = transform.crop or transform.stored
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = network(images)
    meta = weights.meta | {"mean": transform.mean, "std": transform.std}
    meta = {k: json.dumps(v) for k, v in meta.items()}
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # `out` appears only once verified
        file = Path(folder, out.name)
        try:
            features = FORMATS[args.format](file, network, meta, images)
        except ImportError as error:
            text = f"--format {args.format}: {error}; pip install -r eval/requirements.txt"
            raise UserError(text) from None
        difference = float((features - expected).abs().max() / expected.abs().max())
        if not difference < TOLERANCE:
            raise RunError(f"--format {args.format}: features differ by {difference:.1e}")
        file.rename(out)
    print(f"{out}: {expected.shape[1]} features; verified, largest difference {difference:.1e}")
    return {"difference": difference}


def main(argv: list[str] | None = None) -> dict:
    """Run from the command line."""
    arguments = parser(__doc__, device=False)
    arguments.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    arguments.add_argument("--out", help="file to write [encoder.FORMAT]")
    return command(run, arguments, argv)


if __name__ == "__main__":
    main()
