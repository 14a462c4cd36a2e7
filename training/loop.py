"""The step loop, as a generator: it trains, the script looks on after each step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from training.distributed import no_sync, unwrap
from training.method import at_least_float32
from training.precision import Precision
from training.schedules import learning_rate

FORWARD = 3  # stream of random numbers; the loader has 1 and 2


@dataclass
class Step:
    """What happened in step `index` of 0 .. total-1; tensors are on the device, not yet read."""

    index: int
    total: int
    epoch: int
    loss: Tensor
    logs: dict[str, Tensor | float]
    lr: float
    images: int
    applied: bool

    @property
    def last(self) -> bool:
        return self.index == self.total - 1


def seed_step(seed: int, step: int, rank: int) -> None:
    """torch's global generator as a function of the step: a method's own randomness resumes."""
    words = np.random.SeedSequence([seed, FORWARD, step, rank]).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def train_steps(
    model: nn.Module,
    loader,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    *,
    peak: float,
    warmup: int,
    total: int,
    start: int = 0,
    stop: int = 0,
) -> Iterator[Step]:
    """Train steps start .. min(stop, total)-1 of a schedule over `total`; yield after each.

    model      a Method, or DDP around one
    loader     gives batches(step), steps_per_epoch, batch_size, accumulate, seed, rank
    peak       the rate after `warmup` steps
    A step that the gradient scaler skips advances the index and changes nothing else.
    """
    method = unwrap(model)
    for k in range(start, min(stop or total, total)):
        lr = learning_rate(peak, k, warmup, total)
        for group in optimizer.param_groups:
            group["lr"] = peak if group.get("constant") else lr
        model.train()
        seed_step(loader.seed, k, loader.rank)
        loss_of_step = 0.0
        for part, (views, labels) in enumerate(loader.batches(k)):
            with no_sync(model, skip=part + 1 < loader.accumulate):
                with precision.autocast():
                    outputs = model(*views)
                outputs = at_least_float32(outputs)
                known = (labels,) if method.uses_labels else ()
                loss, logs = method.loss(outputs, *known)
                loss = loss / loader.accumulate
                precision.backward(loss)
            loss_of_step = loss_of_step + loss.detach()
        applied = precision.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        if applied:
            logs = logs | method.after_step(k / total)
        yield Step(
            index=k,
            total=total,
            epoch=k // loader.steps_per_epoch,
            loss=loss_of_step,
            logs=logs,
            lr=lr,
            images=loader.batch_size,
            applied=applied,
        )
