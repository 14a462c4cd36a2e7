"""The thin main of every script: settings, processes, run."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from core.errors import STOPPED, Stopped, UserError, one_line_errors, tell
from core.options import RunConfig
from training import distributed
from training.distributed import Processes
from training.run_folder import check_free, check_place


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
        run_again_if_restarted(config.run)
        check_run(config)
        distributed.relaunch_if_needed(config.run.gpus, config.run.device, argv)
        distributed.end_with_launcher()
        prepare(config)
        r = config.run
        processes = distributed.start(r.device, r.threads, r.dist_timeout, r.quiet)
        try:
            result = run(config, processes)
        except Stopped as stop:
            if stop.asked:
                distributed.finish()
                raise SystemExit(STOPPED) from None
            result = {}
        except Exception as error:
            if processes.world_size > 1:
                tell(error, processes.rank, debug)
                os._exit(1)  # leaving the group would wait for ranks that are somewhere else
            raise
        distributed.finish()
    return result


def run_again_if_restarted(run: RunConfig) -> None:
    """After a crash the launcher types what was typed at first: then --resume is meant."""
    if distributed.restarted():
        if not run.resume or list(Path(run.out).glob("checkpoints/step-*.pt")):
            run.resume = "auto"


def check_run(config) -> None:
    """UserError where --out or --resume can't be what was meant."""
    out, resume = Path(config.run.out), config.run.resume
    check_free(out, bool(resume), config.run.overwrite)
    check_place(out, Path(config.data.data_root), config.run.overwrite)
    if resume not in ("", "auto") and not Path(resume).is_file():
        raise UserError(f"--resume {resume}: no such file")
