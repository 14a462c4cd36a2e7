"""All-gather with gradients, for losses that compare the images of all ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All-gather; the backward pass sums all ranks' gradients and returns this rank's slice."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def all_gather(x: Tensor) -> Tensor:
    """Concatenate x of all ranks, (B, ...) each, to (world_size * B, ...), in the order of ranks.

    B is the same on all ranks, so a rank's rows start at own_rank() * B.  Without a process group,
    the result is x.  Gradients flow to all ranks.  The loss may be the mean over this rank's rows,
    or that over all rows on every rank: DDP's averaged gradient is then that of the global batch.
    """
    return _Gather.apply(x.contiguous()) if dist.is_initialized() else x
