"""The same model in several processes: what keeps it equal, and what finds where it is not."""

import torch
import torch.distributed as dist
from torch import nn

from core.errors import RunError


def broadcast_buffers(method: nn.Module) -> None:
    """Give every process rank 0's buffers: with local batch norm they differ."""
    for buffer in method.buffers():
        dist.broadcast(buffer, 0)


def compare_replicas(method: nn.Module, done: int, local_buffers: bool) -> None:
    """RunError, on all ranks alike, where they have done other steps or hold other weights.

    Sums of the values' bits are compared, in one small collective: a single weight is found.
    """
    values = dict(method.named_parameters() if local_buffers else method.state_dict())
    steps = torch.tensor(done, device=next(iter(values.values())).device)
    sums = []
    for x in (steps, *values.values()):
        x = x.detach().reshape(-1)
        x = x if x.element_size() >= 4 else x.float()  # exact; its bits make a whole int32
        sums.append(x.view(torch.int32).sum(dtype=torch.int64))
    extremes = torch.stack([torch.stack(sums), -torch.stack(sums)])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    differs = (extremes[0] != -extremes[1]).tolist()
    if any(differs):
        name = ["the number of steps", *values][differs.index(True)]
        raise RunError(
            f"{name} differs between the processes after step {done:,}: checkpoints on "
            "different disks, a target or buffer that moves by a process's own state, unlike "
            "machines or a faulty one; the newest checkpoint is from before"
        )
