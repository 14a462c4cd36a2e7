"""What each script's main does: read the settings, start the processes, run."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from core.device import pick_device
from core.errors import STOPPED, Stopped, UserError, launched, one_line_errors, tell
from training import distributed
from training.distributed import Processes
from training.run_folder import check_free
from training.stopping import handle


def execute(
    configure: Callable[[list[str]], object],
    run: Callable[[object, Processes], dict],
    prepare: Callable[[object], None],
    argv: list[str] | None = None,
) -> dict:
    """Read the settings, start the processes, call `run(config, processes)`, return its result.

    prepare   called with the settings before a process group exists, to download missing files
    Wrong input ends with one line on stderr, before torchrun starts and before data are read.
    A run that a signal has stopped ends the process with exit code 75, on all ranks.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("--debug" in argv):
        config = configure(argv)
        r = config.run
        several = launched() or r.gpus > 1
        if several:
            from training import launch  # only for several processes

            launch.resume_if_restarted(r)
        check_run(config)
        if several:
            launch.relaunch_if_needed(r.gpus, r.device, argv)
            launch.end_with_launcher()
        prepare(config)
        handle("SIGUSR1", signal.SIG_IGN)  # there is nothing to save yet
        processes = distributed.start(r.device, r.threads, r.dist_timeout, r.quiet)
        result = guarded(run, config, processes)
        distributed.finish()
    return result


def guarded(run: Callable, config, processes: Processes) -> dict:
    """The result of `run`; exits if a signal stopped it, or if it fails in one of several ranks."""
    try:
        return run(config, processes)
    except Stopped as stop:
        if stop.asked:
            distributed.finish()
            raise SystemExit(STOPPED) from None
        return {"stopped": False}  # by --stop-after
    except Exception as error:
        if processes.world_size > 1:
            tell(error, processes.rank, config.run.debug)
            os._exit(1)  # a normal exit would wait for the other ranks in a collective
        raise


def check_run(config) -> None:
    """UserError for a --device, --out or --resume that can't be used."""
    r, out = config.run, Path(config.run.out)
    pick_device(r.device)
    check_free(out, bool(r.resume), r.overwrite)
    images = Path(config.data.data_root).resolve()
    names = set(os.listdir(out)) if out.is_dir() else set()
    not_a_run = names and not names & {".lock", "settings.json"}
    if out.resolve() == images or (not_a_run and out.resolve().is_relative_to(images)):
        raise UserError(f"--out {out}: a folder of images in --data-root; choose another")
    for inside in (Path.cwd(), images):
        if r.overwrite and inside.is_relative_to(out.resolve()):
            raise UserError(f"--overwrite: --out {out} contains {inside}; choose another")
    if r.resume not in ("", "auto") and not Path(r.resume).is_file():
        raise UserError(f"--resume {r.resume}: no such file")
