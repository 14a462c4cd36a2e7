"""Gathering a tensor of all ranks with gradients, for losses that compare images."""

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
    """(B, ...) of each rank, equal shares, as (world_size B, ...) on all; x itself where one is.

    Gradients flow to every rank, so that a loss may compare images of different ranks.  It may be
    the mean over a rank's own rows or, alike on all, that over all rows: DDP's mean over the ranks
    makes the gradient of the global batch of either.  A rank's own rows start at own_rank() B.
    """
    return _Gather.apply(x.contiguous()) if dist.is_initialized() else x
