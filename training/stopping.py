"""Stopping on signals and on values that are not finite, at the same step on all ranks.

A signal handler only sets a flag.  The flags are summed over the processes and read every
--check-every steps and before each checkpoint.
"""

import os
import signal
import threading
import time

import torch
from torch import nn

from core.errors import NotFinite
from training.distributed import Processes, sum_over_ranks

SAME = 2.0  # seconds in which signals count as one: Ctrl-C comes from terminal and torchrun
SKIPS = 50  # steps in a row that the gradient scaler may skip, halving its scale each time


def hangup_ignored() -> bool:
    """Whether SIGHUP (terminal closed) is ignored, as under nohup, or missing, as on Windows."""
    number = getattr(signal, "SIGHUP", None)
    return number is None or signal.getsignal(number) == signal.SIG_IGN


def handle(name: str, handler):
    """Set the handler of a signal and return the previous one.

    Does nothing and returns None if the system lacks the signal (Windows), and in a thread.
    """
    number = getattr(signal, name, None)
    if number is None or threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(number, handler)


class Watch:
    """Context that handles the signals of a run, and checks that its values are finite.

    SIGTERM, SIGINT and SIGHUP save and stop the run (a second one after SAME seconds ends it at
    once); SIGUSR1 saves and continues.  SIGHUP stays ignored under nohup.
    After `look`, `stop` and `save` are the same on all ranks.
    """

    def __init__(self, processes: Processes, check_every: int = 0) -> None:
        self.every = check_every or (1 if processes.device.type == "cpu" else 20)
        self.flags = torch.zeros(3, device=processes.device)  # stop, save, not finite
        self.asked_stop, self.asked_save = 0.0, False  # time of the first stop signal
        self.stop = self.save = False
        self.skipped = 0

    def __enter__(self) -> "Watch":
        handlers = {"SIGTERM": self._stop, "SIGINT": self._stop, "SIGUSR1": self._save}
        if not hangup_ignored():
            handlers["SIGHUP"] = self._stop
        self.previous = {name: handle(name, handler) for name, handler in handlers.items()}
        return self

    def _stop(self, number, frame) -> None:
        if self.asked_stop and time.monotonic() > self.asked_stop + SAME:
            os._exit(128 + number)
        self.asked_stop = self.asked_stop or time.monotonic()

    def _save(self, number, frame) -> None:
        self.asked_save = True

    def __exit__(self, *error) -> None:
        for name, handler in self.previous.items():
            if handler is not None:
                handle(name, handler)

    def look(self, step, model: nn.Module, optimizer=None, saving: bool = False) -> None:
        """Read the flags if due or before a save; NotFinite, on all ranks, for such values."""
        self.skipped = 0 if step.applied else self.skipped + 1
        if step.applied:
            self.flags[2] += ~torch.isfinite(step.loss)
        elif self.skipped >= SKIPS:
            self.flags[2] += 1
        if not (saving or step.last or step.index % self.every == 0):
            return
        self.flags[0], self.flags[1] = float(self.asked_stop > 0), float(self.asked_save)
        stop, save, bad = sum_over_ranks(self.flags.clone()).tolist()
        self.stop, self.save = stop > 0, save > 0
        if self.save:
            self.asked_save = False
        if saving or step.last or self.stop or self.save:  # only then are all weights checked
            values = [*model.state_dict().values()]
            for state in optimizer.state.values() if optimizer else ():
                values += [v for v in state.values() if isinstance(v, torch.Tensor)]
            values = [v for v in values if v.is_floating_point() and v.numel()]
            values = [v for v in values if v.device == self.flags.device]
            largest = torch.stack(torch._foreach_norm(values, float("inf")))
            bad += sum_over_ranks((~torch.isfinite(largest)).sum()).item()
        if bad:
            self.flags, self.skipped = torch.zeros_like(self.flags), 0  # a sweep goes on
            raise NotFinite(
                f"loss or weights are not finite at step {step.index}: lower --lr, or --precision "
                "fp32; the newest checkpoint is from before"
            )
