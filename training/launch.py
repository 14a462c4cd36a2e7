"""Launching: `python X --gpus 4` and `torchrun X --gpus 4` start 4 processes with torchrun."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from core.device import BACKENDS, pick_device
from core.errors import LAUNCHER, UserError, launched
from training.stopping import handle, hangup_ignored

PREFIXES = ("GROUP_", "ROLE_", "MASTER_", "PET_", "TORCHELASTIC_")  # of torchrun's variables
RELAUNCHED = "BYOL_RELAUNCHED"  # process id of the torchrun that --gpus has started
RESTARTED = "BYOL_RESTARTED"  # set if torchrun had restarted this process before --gpus replaced it


def resume_if_restarted(run) -> None:
    """Set --resume if torchrun has restarted a failed job: it repeats the flags of the first start.

    A --resume FILE is kept until the run folder has a checkpoint.
    """
    saved = list(Path(run.out).glob("checkpoints/step-*.pt"))
    if restarted() and (saved or not run.resume):
        run.resume = "auto"


def restarted() -> bool:
    """Whether torchrun has restarted this process after a failure (its --max-restarts)."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or RESTARTED in os.environ
    return launched() and again


def relaunch_if_needed(gpus: int, device: str, argv: list[str]) -> None:
    """Replace this process by torchrun if --gpus asks for more processes than there are.

    So both `python X --gpus 4` and `torchrun X --gpus 4`, which starts one process, start four.
    """
    names = "LOCAL_WORLD_SIZE", "WORLD_SIZE"  # processes on this machine, on all
    started, total = (int(os.environ[name]) if launched() else 1 for name in names)
    kind = pick_device(device)
    if kind not in BACKENDS and (gpus > 1 or os.environ.get("WORLD_SIZE", "1") != "1"):
        raise UserError(f"--device {kind}: runs in one process; leave out --gpus and torchrun")
    count, asked = torch.cuda.device_count(), max(gpus, started)
    if kind == "cuda" and asked > count:
        flag = "--gpus" if gpus > count else "--nproc-per-node"
        raise UserError(f"{flag} {asked}: this machine has {count}")
    if gpus in (1, started):
        return
    if total > 1 or RELAUNCHED in os.environ:
        raise UserError(f"--gpus {gpus}: the launcher started {total}; leave out one of the two")
    program = _program(gpus)
    environment = {
        k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(PREFIXES)
    }
    environment[RELAUNCHED] = str(os.getpid())
    if restarted():
        environment[RESTARTED] = "1"
    environment.setdefault("OMP_NUM_THREADS", "1")  # torchrun does the same with a long warning
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    if hangup_ignored():  # torchrun would handle it and end its processes
        command.append("--signals-to-handle=SIGTERM,SIGINT,SIGQUIT")
    command += [f"--nproc-per-node={gpus}", *program, *argv]
    handle("SIGUSR1", signal.SIG_IGN)  # it would kill torchrun
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


def _program(gpus: int) -> list[str]:
    """Arguments for Python that start this script again; UserError for a notebook or python -c."""
    script, spec = sys.argv[0], getattr(sys.modules["__main__"], "__spec__", None)
    by_name = spec is not None and spec.origin == script  # python -m
    if hasattr(sys, "ps1") or not (by_name or os.path.exists(script)):
        raise UserError(
            f"--gpus {gpus}: no script to start again (a notebook, python -c); type the command in "
            "a shell, as in: python train_byol.py --gpus 2"
        )
    return ["-m", spec.name] if by_name else [script]


def end_with_launcher() -> None:
    """End this process within a second of its launcher's death, so that no orphan keeps a GPU."""
    if launched():
        launcher = int(os.environ.get(RELAUNCHED, os.getppid()))
        threading.Thread(target=_follow, args=(launcher,), daemon=True).start()


def _follow(launcher: int) -> None:
    """Runs in a thread, since a process that waits in a collective handles no signals."""
    while os.getppid() == launcher:  # changes when the parent dies
        time.sleep(1)
    os._exit(1)
