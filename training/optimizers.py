"""The optimizers: LARS, and torch's SGD and AdamW."""

from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from core.errors import UserError
from core.options import option


@dataclass
class OptimConfig:
    """[optim]: the optimizer and how long it runs."""

    optimizer: str = option("lars", "optimizer", choices=("lars", "sgd", "adamw"))
    lr: float = option(2.0, "learning rate per 256 images (lars, sgd); not scaled for adamw", low=0)
    weight_decay: float = option(1e-6, "weight decay, not for biases and norms", low=0)
    momentum: float = option(0.9, "momentum of lars and sgd", low=0, high=0.9999)
    batch_size: int = option(256, "GLOBAL batch size, over all processes", low=1)
    nesterov: bool = option(False, "Nesterov momentum for sgd")
    accumulate: int = option(1, "micro-batches per global batch", low=1)
    epochs: int = option(100, "epochs over the training images", low=1)
    steps: int = option(0, "optimizer steps instead of epochs (0: use --epochs)", low=0)
    warmup_epochs: float = option(10, "linear warm-up, at most half of all steps", low=0)

    def total_steps(self, steps_per_epoch: int) -> int:
        """K, the number of attempted steps."""
        return self.steps or self.epochs * steps_per_epoch

    def check(self, label: str) -> None:
        """UserError for a learning rate far too high for adamw, and for half of Nesterov's sgd."""
        if self.optimizer == "adamw" and self.lr > 0.05:
            raise UserError(f"--lr {self.lr:g} is a rate for lars or sgd; adamw wants about 1e-3")
        if self.optimizer == "sgd" and self.nesterov and not self.momentum:
            raise UserError("--momentum 0: Nesterov's needs one; add --no-nesterov")


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888), as in BYOL's released code.

    g <- g + wd w;  g <- g eta |w|/|g| (factor 1 when a norm is 0);  m <- momentum m + g;
    w <- w - lr m.  Groups with adapt=False skip the second assignment.  The CPU never reads a norm.
    """

    def __init__(self, params, lr=0.0, momentum=0.9, weight_decay=0.0, eta=1e-3) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, adapt=True)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads = [p.grad for p in weights]
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
            if group["adapt"]:
                grads = torch._foreach_mul(grads, self._trust(weights, grads, group["eta"]))
            for p in weights:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            velocity = [self.state[p]["momentum"] for p in weights]
            torch._foreach_mul_(velocity, group["momentum"])
            torch._foreach_add_(velocity, grads)
            torch._foreach_add_(weights, velocity, alpha=-group["lr"])

    @staticmethod
    def _trust(weights, grads, eta: float) -> list[torch.Tensor]:
        """eta |w|/|g| for each tensor, 1 where either norm is 0."""
        w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, grads))
        return list(torch.where((w > 0) & (g > 0), eta * w / g, 1.0))


def build_optimizer(name: str, groups: list[dict], momentum: float, nesterov=False) -> Optimizer:
    """lars, sgd or adamw over parameter groups; the loop sets the learning rate at each step."""
    if name == "lars":
        return LARS(groups, momentum=momentum)
    groups = [{k: v for k, v in group.items() if k != "adapt"} for group in groups]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
