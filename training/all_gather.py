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
    """Concatenate x of all ranks, (B, ...) each, to (world_size * B, ...); x itself if not in DDP.

    The result has the same B on every rank; a rank's rows start at own_rank() * B.  Gradients flow
    to all ranks.  The loss may be the mean over this rank's rows, or the same mean over all rows on
    every rank: after DDP has averaged the gradients, both give that of the global batch.
    """
    return _Gather.apply(x.contiguous()) if dist.is_initialized() else x
