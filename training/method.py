"""The seam: what a self-supervised method (or the supervised classifier) has to be.

The loop, the checkpoints and the evaluation know this class and nothing else of a method.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.options import option

__all__ = ["Method", "option"]
KERNELS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


class Method(nn.Module):
    """Everything that is trained, and everything that a checkpoint must hold.

    All state lives in parameters and buffers; all randomness comes from torch's global generator,
    which the loop seeds anew for each step.
    """

    name: str = ""  # the recipe's table and the run folder's default name
    defaults: dict = {}  # tables laid over the shared defaults, e.g. {"optim": {"lr": 0.05}}
    uses_labels: bool = False  # then loss(outputs, labels); a label of -1 means unknown
    views: tuple | None = None  # None: the recipe's view1 and view2; or own ViewConfigs

    @dataclass
    class Config:
        """Options of the method."""

    def __init__(self, encoder: nn.Module, config) -> None:
        """`encoder` maps (B, 3, H, W) to (B, encoder.feature_size)."""
        super().__init__()
        self.encoder = encoder
        self.config = config

    def forward(self, *views: Tensor) -> dict[str, Tensor]:
        """The networks' outputs, each stacked over views: (V, B, D).

        Runs inside DDP and autocast, once for all views; each view passes by itself, so that batch
        statistics are per view.  Here: encoder, `projector`, then `predictor`, the last two where
        the method has them (not None), as representation, projection and prediction.
        """
        outputs = {"representation": [self.encoder(view) for view in views]}
        before = "representation"
        for name, head in (("projection", "projector"), ("prediction", "predictor")):
            if getattr(self, head, None) is not None:
                outputs[name] = [getattr(self, head)(x) for x in outputs[before]]
                before = name
        return {name: torch.stack(values) for name, values in outputs.items()}

    def loss(self, outputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise and what else to log; runs outside DDP and autocast.

        The outputs arrive in float32 at least.
        """
        raise NotImplementedError

    def after_step(self, progress: float) -> dict[str, float]:
        """Called after each applied optimizer step with progress = k/K in [0, 1); what to log."""
        return {}

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Optimizer groups, see `groups_by_kind`.

        A group with "constant": True keeps the peak of the rate.
        """
        return groups_by_kind(self, weight_decay)


def groups_by_kind(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups of a module's trained parameters: kernels, and all others.

    Kernels are the weights of linear layers, convolutions and attention.  The others get no weight
    decay and no LARS adaptation: biases, norms, and what a transformer or fork has besides (class
    tokens, position embeddings, layer scale, prototypes).  As in BYOL's code, which goes by the
    names of its layers.
    """
    kernels = {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, KERNELS)
        for name, parameter in layer.named_parameters(recurse=False)
        if name.endswith("weight")
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    others = [p for p in trained if id(p) not in kernels]
    return [
        {"params": [p for p in trained if id(p) in kernels], "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]


def at_least_float32(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a forward pass as the loss gets them: half precisions become float32."""
    for name, value in outputs.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"forward gave a {type(value).__name__} as {name}, not a tensor (V, B, D)"
            )
    half = (torch.float16, torch.bfloat16)
    return {k: v.float() if v.dtype in half else v for k, v in outputs.items()}
