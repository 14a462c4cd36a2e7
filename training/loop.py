"""The training loop as a generator over steps, and its precision."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from core.errors import UserError
from training.distributed import no_sync, unwrap
from training.method import at_least_float32

FORWARD = 3  # number of this stream of random numbers; the loader uses 1 and 2


def warmup_steps(warmup_epochs: float, steps_per_epoch: int, total: int) -> int:
    """Length of the warm-up in steps, at most half of all steps."""
    return min(round(warmup_epochs * steps_per_epoch), total // 2)


def peak_rate(optimizer: str, lr: float, batch_size: int) -> float:
    """The learning rate after the warm-up: lr x batch / 256 (Sec. 3.3), but lr for adamw."""
    return lr if optimizer == "adamw" else lr * batch_size / 256


def pick_precision(name: str, device: torch.device) -> str:
    """The precision to use; auto: bf16 if a CPU or CUDA GPU has it, else fp16 on CUDA, or fp32."""
    native, other = device.type == "cpu" and cpu_has_bf16(), "fp32"
    if device.type == "cuda":
        native, other = torch.cuda.get_device_capability(device) >= (8, 0), "fp16"
        if name == "bf16" and not native:
            raise UserError("--precision bf16: this GPU does not support it; use fp16 or fp32")
    elif name == "fp16" and device.type not in ("cpu", "mps"):  # GradScaler uses float64
        raise UserError(f"--precision fp16: needs float64, which {device.type} may lack; use bf16")
    if name == "auto":
        return "bf16" if native else other
    return name


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


class Precision:
    """Autocast and gradient scaling of one run."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        """Context for the forward pass; inside it, a loss would be computed in half precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Optimizer step; returns False if the scaler skipped it (fp16; this waits for the GPU)."""
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before > 0

    def load_state_dict(self, state: dict) -> None:
        """Restore the scaler; the saved state is empty if the run had none."""
        if state:
            self.scaler.load_state_dict(state)


@dataclass
class Step:
    """The outcome of step `index` of 0 .. total-1; its tensors are still on the device."""

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
    """Seed torch's global generator for a step, so that a resumed method draws the same numbers."""
    words = np.random.SeedSequence([seed, FORWARD, step, rank]).generate_state(2)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def train_step(
    model: nn.Module, loader, optimizer, precision: Precision, k: int, progress: float
) -> tuple[Tensor, dict[str, Tensor | float], bool]:
    """Forward, backward, optimizer, `after_step`; returns loss, logs, whether it was applied."""
    method, loss_of_step, logs = unwrap(model), 0.0, {}
    model.train()
    seed_step(loader.seed, k, loader.rank)
    for part, (views, labels) in enumerate(loader.batches(k)):
        with no_sync(model, skip=part + 1 < loader.accumulate):
            with precision.autocast():
                outputs = model(*views)
            outputs = at_least_float32(outputs)
            known = (labels,) if method.uses_labels else ()
            loss, terms = method.loss(outputs, *known)
            loss = loss / loader.accumulate
            precision.scaler.scale(loss).backward()
        loss_of_step = loss_of_step + loss.detach()
        for name, term in terms.items():
            term = term.detach() if isinstance(term, Tensor) else float(term)
            logs[name] = logs.get(name, 0.0) + term / loader.accumulate
    applied = precision.step(optimizer)
    optimizer.zero_grad(set_to_none=True)  # a CUDA graph would overwrite gradients that stay
    if applied:
        logs = logs | method.after_step(progress)
    return loss_of_step, logs, applied


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
    loader     has batches(step), steps_per_epoch, batch_size, accumulate, seed, rank
    peak       the learning rate after `warmup` steps
    A step that the gradient scaler skips only advances the index.
    """
    for k in range(start, min(stop or total, total)):
        lr = unwrap(model).learning_rate(peak, k, warmup, total)
        for group in optimizer.param_groups:
            group["lr"] = peak if group.get("constant") else lr
        loss, logs, applied = train_step(model, loader, optimizer, precision, k, progress=k / total)
        epoch = k // loader.steps_per_epoch
        yield Step(k, total, epoch, loss, logs, lr, loader.batch_size, applied)
