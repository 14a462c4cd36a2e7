"""Batch norm over all processes: torch.nn.SyncBatchNorm on CUDA, a small version of it on CPU."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _AllReduce(torch.autograd.Function):
    """Sum over processes, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class CrossReplicaBatchNorm(_BatchNorm):
    """torch's BatchNorm1d/2d whose batch is that of all processes together (equal shares).

    Mean first, then centred squares: two small reductions, and no cancellation in float32.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _AllReduce.apply(wide.sum(dims)) / count
        centred = wide - mean.view(shape)
        variance = _AllReduce.apply(centred.square().sum(dims)) / count
        if self.track_running_stats:
            with torch.no_grad():  # running variance is the unbiased one
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = (variance + self.eps).rsqrt() * self.weight
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def convert_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every batch norm made cross-replica; parameters and buffers are kept."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            new = CrossReplicaBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            new._parameters, new._buffers = child._parameters, child._buffers
            new.training = child.training
            setattr(module, name, new)
        else:
            convert_batch_norm(child, device)
    return module
