"""Batch norm over all processes: torch.nn.SyncBatchNorm on CUDA, a small equivalent on CPU."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm


class _Normalize(torch.autograd.Function):
    """Batch norm with the statistics of all processes: one small collective in each direction.

    torch's kernels do all passes over the activations but the last one of the gradient: the rank's
    mean and variance, the normalization by the global ones, and the sums of the gradient.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        """(normalized x, mean, biased variance); all ranks have equally many images."""
        # gives the statistics their dtype, float32 for half-precision x
        unused = torch.zeros_like(weight)
        local = torch.stack(torch.batch_norm_update_stats(x, unused, unused, 0.0))
        shares = local.new_empty(dist.get_world_size(), *local.shape)
        dist.all_gather(list(shares), local)
        means, variances = shares.unbind(1)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        """weight / std (grad - mean(grad) - x^ mean(grad x^)), with means over all processes.

        x^ is the normalized x.  The gradients of weight and bias stay local, since DDP averages
        those of all parameters.
        """
        x, weight, mean, variance = ctx.saved_tensors
        scaled, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        means = torch.stack([of_bias, of_weight])
        dist.all_reduce(means)
        means /= x.numel() // x.shape[1] * dist.get_world_size()
        inverse = (variance + ctx.eps).rsqrt()
        slope = weight * inverse * inverse * means[1]
        offset = weight * inverse * means[0] - slope * mean
        shape = [1, -1] + [1] * (x.ndim - 2)
        slope, offset = (v.to(x.dtype).view(shape) for v in (slope, offset))
        return scaled.sub_(torch.addcmul(offset, x, slope)), of_weight, of_bias, None


class CrossReplicaBatchNorm(_BatchNorm):
    """torch's BatchNorm1d/2d over the global batch; all ranks have equally many images."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        weight, bias = self.weight, self.bias
        if not self.affine:
            weight = x.new_ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
            bias = torch.zeros_like(weight)
        y, mean, variance = _Normalize.apply(x, weight, bias, self.eps)
        if self.track_running_stats:
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            unbiased = variance * (count / (count - 1))
            self.running_var.lerp_(unbiased, self.momentum)
        return y


def convert_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with cross-replica batch norms, which keep their parameters and buffers."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            settings = child.num_features, child.eps, child.momentum, child.affine
            new = CrossReplicaBatchNorm(*settings, child.track_running_stats)
            new._parameters, new._buffers = child._parameters, child._buffers
            new.training = child.training
            setattr(module, name, new)
        else:
            convert_batch_norm(child, device)
    return module
