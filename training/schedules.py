"""Schedules: pure functions of the step index k = 0 .. K-1 of attempted steps."""

import math


def warmup_steps(warmup_epochs: float, steps_per_epoch: int, total: int) -> int:
    """W: the warm-up's steps as they are asked for, but at most half of the run.

    The shortest of the authors' presets, 40 epochs, warms up for a quarter of it.
    """
    return min(round(warmup_epochs * steps_per_epoch), total // 2)


def learning_rate(peak: float, step: int, warmup: int, total: int) -> float:
    """Linear from 0 to `peak` over `warmup` steps, then cosine towards 0 at `total` (Sec. 3.3)."""
    if step < warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def peak_rate(optimizer: str, lr: float, batch_size: int) -> float:
    """The actual learning rate: lr x batch / 256 for lars and sgd (Sec. 3.3), lr for adamw."""
    return lr if optimizer == "adamw" else lr * batch_size / 256
