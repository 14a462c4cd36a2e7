"""Comparison of the model between processes, and the broadcast of local buffers."""

import torch
import torch.distributed as dist
from torch import nn

from core.errors import RunError


def broadcast_buffers(method: nn.Module) -> None:
    """Give every process rank 0's buffers, which differ with local batch norm."""
    for buffer in method.buffers():
        dist.broadcast(buffer, 0)


def compare_replicas(method: nn.Module, done: int, local_buffers: bool) -> None:
    """RunError, on all ranks, if their number of steps or their weights differ.

    One small collective compares a sum of the bits of each tensor, which one changed value changes.
    """
    values = dict(method.named_parameters() if local_buffers else method.state_dict())
    steps = torch.tensor(done, device=next(iter(values.values())).device)
    sums = []
    for x in (steps, *values.values()):
        x = x.detach().reshape(-1)
        x = x if x.element_size() >= 4 else x.float()  # exact, and its bits fill whole int32 values
        sums.append(x.view(torch.int32).sum(dtype=torch.int64))
    extremes = torch.stack([torch.stack(sums), -torch.stack(sums)])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    differs = (extremes[0] != -extremes[1]).tolist()
    if any(differs):
        name = ["the number of steps", *values][differs.index(True)]
        raise RunError(
            f"{name} differs between the processes after step {done:,}: checkpoints on "
            "different disks, a method that updates weights or buffers differently on each rank, "
            "different or faulty machines; the newest checkpoint is from before"
        )
