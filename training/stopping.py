"""When to stop: signals and non-finite values, decided by all processes together.

A handler only sets a flag.  Flags are summed over the processes and read every --check-every
steps and before each checkpoint, so that all ranks stop at the same step.
"""

import os
import signal

import torch
from torch import nn

from training.distributed import Processes, sum_over_ranks

STOPPED = 75  # exit code (EX_TEMPFAIL): saved on request, go on with --resume


class NonFinite(Exception):
    """The loss or the weights are not finite any more."""


class Watch:
    """Signal flags and the finite flag of one run; use as a context manager.

    SIGTERM and SIGINT ask to save and stop (a second one ends at once), SIGUSR1 to save and go on.
    After `look`, `stop` and `save` are the same on all ranks.
    """

    def __init__(self, processes: Processes, check_every: int = 0) -> None:
        self.every = check_every or (20 if processes.device.type == "cuda" else 1)
        self.flags = torch.zeros(3, device=processes.device)  # stop, save, not finite
        self.asked_stop = self.asked_save = False
        self.stop = self.save = False

    def __enter__(self) -> "Watch":
        def stop(number, frame):
            if self.asked_stop:
                os._exit(128 + number)
            self.asked_stop = True

        def save(number, frame):
            self.asked_save = True

        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGUSR1: save}
        self.previous = {number: signal.signal(number, h) for number, h in handlers.items()}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def look(self, step, model: nn.Module, saving: bool = False) -> None:
        """Read the flags where it is time to, or before a save; raises NonFinite on all ranks."""
        if step.applied:
            self.flags[2] += ~torch.isfinite(step.loss)
        if not (saving or step.last or step.index % self.every == 0):
            return
        if saving or step.last:
            norms = torch._foreach_norm([p for p in model.parameters()])
            self.flags[2] += ~torch.isfinite(torch.stack(norms).sum())
        self.flags[0], self.flags[1] = float(self.asked_stop), float(self.asked_save)
        stop, save, bad = sum_over_ranks(self.flags.clone()).tolist()
        if bad:
            raise NonFinite(
                f"not finite at step {step.index}: lower --lr, or --precision fp32; "
                "the newest checkpoint is from before"
            )
        self.stop, self.save = stop > 0, save > 0
        if self.save:
            self.asked_save = False
