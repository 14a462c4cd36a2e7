"""The thin main of every script: settings, processes, run."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from core.device import pick_device
from core.errors import STOPPED, Stopped, UserError, launched, one_line_errors, tell
from training import distributed
from training.distributed import Processes
from training.run_folder import check_free, check_place
from training.stopping import handle


def execute(
    configure: Callable[[list[str]], object],
    run: Callable[[object, Processes], dict],
    prepare: Callable[[object], None],
    argv: list[str] | None = None,
) -> dict:
    """Read the settings, start the processes, call `run(config, processes)`, return its result.

    prepare   function of the settings that fetches what is missing, before a process group exists
    Wrong input is one line on stderr, before torchrun, data or a network are touched.
    A run that was asked to stop ends the process with exit code 75, on all ranks.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    with one_line_errors(debug, printed=False):
        config = configure(argv)
        r = config.run
        if launched() or r.gpus > 1:
            from training import launch  # of no use to a single process

            launch.resume_if_restarted(r)
            check_run(config)
            launch.relaunch_if_needed(r.gpus, r.device, argv)
            launch.end_with_launcher()
        else:
            check_run(config)
        prepare(config)
        handle("SIGUSR1", signal.SIG_IGN)  # there is nothing to save yet
        processes = distributed.start(r.device, r.threads, r.dist_timeout, r.quiet)
        try:
            result = run(config, processes)
        except Stopped as stop:
            if stop.asked:
                distributed.finish()
                raise SystemExit(STOPPED) from None
            result = {"stopped": False}
        except Exception as error:
            if processes.world_size > 1:
                tell(error, processes.rank, debug)
                os._exit(1)  # leaving the group would wait for ranks that are somewhere else
            raise
        distributed.finish()
    return result


def check_run(config) -> None:
    """UserError where --device, --out or --resume can't be what was meant."""
    pick_device(config.run.device)
    out, resume = Path(config.run.out), config.run.resume
    check_free(out, bool(resume), config.run.overwrite)
    check_place(out, Path(config.data.data_root), config.run.overwrite)
    if resume not in ("", "auto") and not Path(resume).is_file():
        raise UserError(f"--resume {resume}: no such file")
