"""Several processes hold one model: what keeps it equal, and what finds where it is not."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from core.errors import RunError


def compare(method: nn.Module, done: int, batch_norm: str, device: torch.device) -> None:
    """RunError, on all ranks alike, where they stand at other steps or hold other weights."""
    tensors = {"the number of steps": torch.tensor([done], device=device)}
    local = batch_norm == "local"  # then buffers differ
    tensors |= dict(method.named_parameters() if local else method.state_dict())
    if name := first_difference(tensors):
        raise RunError(
            f"{name} differs between the processes after step {done:,}: checkpoints on "
            "different disks, a target or buffer that moves by a process's own state, unlike "
            "machines or a faulty one; the newest checkpoint is from before"
        )


def first_difference(tensors: dict[str, Tensor]) -> str:
    """The name of the first tensor that is not the same, bit for bit, on all ranks; "" if none.

    Sums of the values' bits are compared, in one small collective: a single weight is found.
    """
    bits = {1: torch.uint8, 2: torch.int16}  # else pieces of 4 bytes, whose sum has room
    flat = [t.detach().reshape(-1) for t in tensors.values()]
    flat = [values.view(bits.get(values.element_size(), torch.int32)) for values in flat]
    sums = torch.stack([values.sum(dtype=torch.int64) for values in flat])
    extremes = torch.stack([sums, -sums])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    differs = (extremes[0] != -extremes[1]).tolist()
    return next((name for name, differ in zip(tensors, differs, strict=True) if differ), "")


def broadcast_buffers(method: nn.Module) -> None:
    """Give every process rank 0's buffers: with local batch norm they differ."""
    for buffer in method.buffers():
        dist.broadcast(buffer, 0)
