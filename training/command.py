"""The thin main of every script: settings, processes, run, and what the shell gets to see.

Exit codes: 0 done, 1 failed, 2 wrong input, 75 stopped by a signal (saved; --resume goes on).
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from data import datasets
from training import distributed
from training.config import UserError
from training.distributed import Processes
from training.run_folder import check_free
from training.stopping import STOPPED, NonFinite


def execute(
    configure: Callable[[list[str]], object],
    run: Callable[[object, Processes], dict],
    argv: list[str] | None = None,
) -> dict:
    """Read the settings, start the processes, call `run(config, processes)`, return its result.

    Wrong input is one line on stderr, before torchrun, data or a network are touched.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        config = configure(argv)
        resume = config.run.resume
        check_free(Path(config.run.out), bool(resume), config.run.overwrite)
        if resume not in ("", "auto") and not Path(resume).is_file():
            raise UserError(f"--resume {resume}: no such file")
        distributed.relaunch_if_needed(config.run.gpus, config.run.device, argv)
        datasets.prepare(config.data)
        processes = distributed.start(
            config.run.device, config.run.threads, config.run.dist_timeout, config.run.quiet
        )
        try:
            result = run(config, processes)
        except Exception as error:
            if processes.world_size > 1:
                _tell(error, processes.main)
                os._exit(1)  # leaving the group would wait for ranks that are somewhere else
            raise
        distributed.finish()
    except (UserError, NonFinite) as error:
        if "--debug" in argv:
            raise
        _tell(error, os.environ.get("RANK", "0") == "0")
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    if result.get("stopped"):
        raise SystemExit(STOPPED)
    return result


def _tell(error: Exception, main: bool) -> None:
    """One line from the main process for what all ranks meet alike; else the traceback."""
    sys.stdout.flush()
    if not isinstance(error, UserError | NonFinite):
        traceback.print_exception(error)
    elif main:
        print(f"error: {error}", file=sys.stderr, flush=True)
