"""The process group, DDP and collectives."""

import contextlib
import datetime
import inspect
import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.device import BACKENDS, CPU, memory_format, pick_device
from core.errors import launched


@dataclass(frozen=True)
class Processes:
    """This process's rank and device, and the number of processes."""

    rank: int
    world_size: int
    device: torch.device
    quiet: bool = False

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


SINGLE = Processes(0, 1, CPU)


def start(device: str, threads: int, timeout: float, quiet=False) -> Processes:
    """Set the device and the thread count; under torchrun, join the process group."""
    local_rank, local_size, world_size = 0, 1, 1
    if launched():
        names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
        local_rank, local_size, world_size = (int(os.environ[name]) for name in names)
    usable = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(usable(0)) if usable else os.cpu_count()
    torch.set_num_threads(threads or max(1, cores // local_size))
    device = torch.device(pick_device(device))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32; bf16 is the fast choice
    if world_size > 1 and not dist.is_initialized():
        limit = datetime.timedelta(seconds=timeout)
        store, rank, _ = next(dist.rendezvous("env://", timeout=limit))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun's store survives a restart: without a prefix for each attempt, a process
            # could read the address of one that has died
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = BACKENDS[device.type]
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=limit
        )
    return Processes(own_rank(), world_size, device, quiet)


def finish() -> None:
    """Leave the process group once all processes have got here."""
    if dist.is_initialized():
        if dist.get_backend() == "gloo":  # leaving early would break the last collective of others
            dist.monitored_barrier()
        dist.destroy_process_group()


def wrap(method, processes: Processes, batch_norm: str, compiled=False, accumulate=1) -> nn.Module:
    """The method on its device, in DDP if there are several processes.

    batch_norm   "sync": statistics over all processes, which keeps the buffers equal; "local"
    """
    if processes.world_size > 1 and batch_norm == "sync":
        from training.batchnorm import convert_batch_norm  # only for several processes

        method = convert_batch_norm(method, processes.device)
    if compiled:
        torch.compiler.reset()  # graphs of earlier runs count towards dynamo's limit of eight
        # a replay of a CUDA graph overwrites the gradients of the last one; with DDP not yet tried
        graphs = processes.device.type == "cuda" and processes.world_size == accumulate == 1
        mode = "reduce-overhead" if graphs else None
        method.compile(dynamic=False, mode=mode)  # one shape, one graph; SyncBatchNorm splits it
    method.to(processes.device, memory_format=memory_format(processes.device))
    if processes.world_size == 1:
        return method
    # a note on speed, for the weights of depthwise convolutions
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    names = inspect.signature(DistributedDataParallel.__init__).parameters  # torch 2.13 renamed one
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DistributedDataParallel(method, gradient_as_bucket_view=True, **{name: False})


def unwrap(model: nn.Module) -> nn.Module:
    """The method, without DDP around it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_sync(model: nn.Module, skip: bool):
    """Context in which DDP, if `skip`, does not all-reduce the gradients."""
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum `values` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def own_rank() -> int:
    """The rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
