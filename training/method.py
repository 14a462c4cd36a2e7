"""The interface that every method implements, self-supervised or the supervised classifier.

The loop, checkpoints and evaluation use a method only through it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.options import option

__all__ = ["Method", "option"]
KERNELS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def learning_rate(peak: float, step: int, warmup: int, total: int) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then cosine towards 0 at `total` (Sec. 3.3)."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Method(nn.Module):
    """The networks and the loss of one method.

    All state is in parameters and buffers, which a checkpoint saves; all randomness comes from
    torch's global generator, which the loop seeds at each step.
    """

    name: str = ""  # the recipe's table and the run folder's default name
    defaults: dict = {}  # override the shared defaults, e.g. {"optim": {"lr": 0.05}}
    uses_labels: bool = False  # then loss(outputs, labels); a label of -1 means unknown
    views: tuple | None = None  # ViewConfigs; None: the recipe's view1 and view2

    @dataclass
    class Config:
        """Options of the method."""

    def __init__(self, encoder: nn.Module, config) -> None:
        """`encoder` maps (B, 3, H, W) to (B, encoder.feature_size); it is saved and evaluated."""
        super().__init__()
        self.encoder = encoder
        self.config = config

    def forward(self, *views: Tensor) -> dict[str, Tensor]:
        """The networks' outputs by name, each stacked over views: (V, B, D).

        Runs in DDP and autocast, once for all views; each view is a batch of its own, so that batch
        statistics are per view.  By default the outputs are `representation`, and `projection` and
        `prediction` if the method has a `projector` and a `predictor`.
        """
        outputs = [self.encoder(view) for view in views]
        stacked = {"representation": torch.stack(outputs)}
        for name, head in (("projection", "projector"), ("prediction", "predictor")):
            if getattr(self, head, None) is not None:
                outputs = [getattr(self, head)(x) for x in outputs]
                stacked[name] = torch.stack(outputs)
        return stacked

    def loss(self, outputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimize, and tensors to log; outside DDP and autocast, in float32."""
        raise NotImplementedError

    def after_step(self, progress: float) -> dict[str, float]:
        """Called after each applied optimizer step k of K with progress = k/K; returns logs."""
        return {}

    # of step 0 .. total-1; a method may define its own, as (self, peak, step, warmup, total)
    learning_rate = staticmethod(learning_rate)

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Optimizer groups; one with "constant": True has the peak learning rate at every step."""
        return groups_by_kind(self, weight_decay)


def groups_by_kind(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two optimizer groups of a module's trained parameters: kernels, and all others.

    Kernels are the weights of linear layers, convolutions and attention.  The others get no weight
    decay and no LARS adaptation: biases, norms, and a transformer's class tokens, position
    embeddings and layer scales.
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
    """The outputs for the loss, with float16 and bfloat16 tensors converted to float32."""
    half = (torch.float16, torch.bfloat16)
    return {k: v.float() if v.dtype in half else v for k, v in outputs.items()}
