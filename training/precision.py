"""Arithmetic of the network: float32, bfloat16 by autocast, or float16 with a gradient scaler."""

import torch
from torch import Tensor

from core.errors import UserError


def pick_precision(name: str, device: torch.device) -> str:
    """auto -> bf16 where the processor has it natively, fp16 on older GPUs, fp32 on older CPUs."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        if name == "bf16" and not native:
            raise UserError("--precision bf16: this GPU has none; use fp16 or fp32")
        return name if name != "auto" else ("bf16" if native else "fp16")
    return name if name != "auto" else ("bf16" if cpu_has_bf16() else "fp32")


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


class Precision:
    """Autocast and gradient scaling of one run; state_dict holds the scaler's state."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device = name, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self):
        """Context for the network's forward pass; nothing else belongs in it."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of the scaled loss."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer) -> bool:
        """The optimizer's step; False where the scaler skipped it (reads the device, fp16 only)."""
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before > 0

    def state_dict(self) -> dict:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """An empty state (from a run without scaler) leaves the scaler as it starts."""
        if state:
            self.scaler.load_state_dict(state)
