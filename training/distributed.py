"""Launching, process group, DDP, collectives.

`torchrun X --gpus N`, `torchrun --nproc-per-node N X` and `python X --gpus N` are the same run.
Everything that depends on CUDA or on the number of processes is in this file.
"""

import contextlib
import ctypes
import datetime
import inspect
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from core.device import CPU, pick_device
from core.errors import LAUNCHER, UserError, launched
from training.batchnorm import convert_batch_norm

LAUNCHER_PREFIXES = ("GROUP_", "ROLE_", "MASTER_", "PET_", "TORCHELASTIC_")
RELAUNCHED = "BYOL_RELAUNCHED"  # the launcher that --gpus became: its process id; once is enough
RESTARTED = "BYOL_RESTARTED"  # set when the launcher that exec'd us was restarting the job


@dataclass(frozen=True)
class Processes:
    """This process among all of them."""

    rank: int
    world_size: int
    device: torch.device
    quiet: bool = False

    @property
    def main(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0


SINGLE = Processes(0, 1, CPU)


def restarted() -> bool:
    """Whether the launcher starts this process again after a failure (its --max-restarts)."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or RESTARTED in os.environ
    return launched() and again


def relaunch_if_needed(gpus: int, device: str, argv: list[str]) -> None:
    """Replace this process by torchrun where --gpus asks for more than the launcher gave.

    torchrun alone starts one worker and hands it `--gpus 4`; plain python starts none.  Only a
    real launcher counts: rank variables left over in the environment do not.
    """
    device = pick_device(device)
    given = int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1
    if device == "cuda" and gpus > torch.cuda.device_count():
        raise UserError(f"--gpus {gpus}: this machine has {torch.cuda.device_count()}")
    if gpus in (1, given):
        return
    if given > 1 or RELAUNCHED in os.environ:
        raise UserError(f"--gpus {gpus}: the launcher started {given}; leave out one of the two")
    script, spec = sys.argv[0], getattr(sys.modules["__main__"], "__spec__", None)
    by_name = spec is not None and spec.origin == script  # python -m
    if hasattr(sys, "ps1") or not (by_name or os.path.exists(script)):
        raise UserError(
            f"--gpus {gpus}: no script to start again (a notebook, python -c); type the command in "
            "a shell, as in: python train_byol.py --gpus 2"
        )
    sys.stdout.flush()
    environment = {k: v for k, v in os.environ.items() if not _from_launcher(k)}
    environment[RELAUNCHED] = str(os.getpid())
    environment |= {RESTARTED: "1"} if restarted() else {}
    environment.setdefault("OMP_NUM_THREADS", "1")  # torchrun does the same, with a long notice
    program = ["-m", spec.name] if by_name else [script]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    if hangup_ignored():  # the launcher would end its processes all the same
        command.append("--signals-to-handle=SIGTERM,SIGINT,SIGQUIT")
    command += [f"--nproc-per-node={gpus}", *program, *argv]
    handle("SIGUSR1", signal.SIG_IGN)  # it would kill a launcher
    os.execve(sys.executable, command, environment)


def hangup_ignored() -> bool:
    """Whether SIGHUP (a closed terminal) is ignored, as under nohup, or missing, as on Windows."""
    number = getattr(signal, "SIGHUP", None)
    return number is None or signal.getsignal(number) == signal.SIG_IGN


def handle(name: str, handler):
    """Set the handler of a signal; returns the previous one.

    None, and nothing is set, where the system has no such signal (Windows) and in a thread.
    """
    number = getattr(signal, name, None)
    if number is None or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(number, handler)


def end_with_launcher() -> None:
    """From now on end this process within a second of its launcher's death: no orphan on a GPU."""
    if launched():
        launcher = int(os.environ.get(RELAUNCHED, os.getppid()))
        threading.Thread(target=_follow, args=(launcher,), daemon=True).start()


def _follow(launcher: int) -> None:
    """Runs in a thread, since a process that waits in a collective handles no signal.

    A process whose parent dies gets another parent.
    """
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


def _from_launcher(name: str) -> bool:
    keep = name == "TORCHELASTIC_ERROR_FILE"
    return not keep and (name in LAUNCHER or name.startswith(LAUNCHER_PREFIXES))


def start(device: str, threads: int, timeout: float, quiet=False) -> Processes:
    """Join the launcher's process group, if there is one, and set device and thread count."""
    handle("SIGUSR1", signal.SIG_IGN)  # there is nothing to save yet
    names = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    local_rank, local_size, world_size = (
        (int(os.environ[name]) for name in names) if launched() else (0, 1, 1)
    )
    usable = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(usable(0)) if usable else os.cpu_count()
    torch.set_num_threads(threads or max(1, cores // local_size))
    device = torch.device(pick_device(device))
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means float32; bf16 is the fast choice
    else:
        _keep_freed_memory()
    if world_size > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout)
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun's store outlives a restart: without a name of its own for each try, a quick
            # process finds the address of one that has died
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    return Processes(own_rank(), world_size, device, quiet)


def _keep_freed_memory() -> None:
    """Have glibc reuse the memory of a step in the next one: no page faults, 2 to 5 % of the rate.

    At the peak it costs about 100 MB; no effect with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: its highest value


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(method: nn.Module, processes: Processes, batch_norm: str) -> nn.Module:
    """The method on its device, in DDP where there are several processes.

    sync: batch-norm statistics over all processes, so that buffers are equal everywhere.
    """
    if processes.world_size > 1 and batch_norm == "sync":
        method = convert_batch_norm(method, processes.device)
    method.to(processes.device, memory_format=torch.channels_last)
    if processes.world_size == 1:
        return method
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch 2.13 renamed it
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    ids = [processes.device.index] if processes.device.type == "cuda" else None
    return DistributedDataParallel(
        method, device_ids=ids, gradient_as_bucket_view=True, **{name: False}
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The method inside DDP."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def no_sync(model: nn.Module, skip: bool):
    """Context in which DDP leaves gradients local, for all but the last micro-batch."""
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum in place over all processes; nothing to do in a single one."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


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


def gather(x: Tensor) -> Tensor:
    """(B, ...) of each rank, equal shares, as (world_size B, ...) on all; x itself where one is.

    Gradients flow to every rank, so that a loss may compare images of different ranks.  It may be
    the mean over a rank's own rows or, alike on all, that over all rows: DDP's mean over the ranks
    makes the gradient of the global batch of either.  A rank's own rows start at own_rank() B.
    """
    return _Gather.apply(x.contiguous()) if dist.is_initialized() else x


def own_rank() -> int:
    """This process's place among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def first_difference(tensors: dict[str, Tensor]) -> str:
    """The name of the first tensor that is not the same, bit for bit, on all ranks; "" if none.

    Sums of the values' bits are compared, in one small collective: a single weight is found.
    """
    if not dist.is_initialized():
        return ""
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
    if dist.is_initialized():
        for buffer in method.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
