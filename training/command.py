"""The thin main of every script: settings, processes, run, and what the shell gets to see.

Exit codes: 0 done, 1 failed, 2 wrong input, 75 stopped by a signal (saved; --resume goes on).
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from data import datasets
from training import distributed
from training.config import RunError, UserError
from training.distributed import Processes
from training.run_folder import check_free
from training.stopping import STOPPED

SILENCE = 2  # seconds, more than a launcher takes to end the other processes of a failed one
DISCONNECTED = ("onnection closed by peer", "onnection reset", "imed out", "pair closure")
LOST = "lost touch with another process: it has failed, or stood still for --dist-timeout seconds"


def execute(
    configure: Callable[[list[str]], object],
    run: Callable[[object, Processes], dict],
    argv: list[str] | None = None,
) -> dict:
    """Read the settings, start the processes, call `run(config, processes)`, return its result.

    Wrong input is one line on stderr, before torchrun, data or a network are touched.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("--debug" in argv):
        config = configure(argv)
        out, restarted = Path(config.run.out), distributed.restarted()
        if restarted and (not config.run.resume or list(out.glob("checkpoints/step-*.pt"))):
            config.run.resume = "auto"  # after a crash the launcher types what was typed at first
        resume = config.run.resume
        check_free(out, bool(resume), config.run.overwrite)
        if resume not in ("", "auto") and not Path(resume).is_file():
            raise UserError(f"--resume {resume}: no such file")
        distributed.relaunch_if_needed(config.run.gpus, config.run.device, argv)
        distributed.end_with_launcher()
        datasets.prepare(config.data)
        processes = distributed.start(
            config.run.device, config.run.threads, config.run.dist_timeout, config.run.quiet
        )
        try:
            result = run(config, processes)
        except Exception as error:
            if processes.world_size > 1:
                _tell(error, processes.rank, "--debug" in argv)
                os._exit(1)  # leaving the group would wait for ranks that are somewhere else
            raise
        distributed.finish()
    if result.get("stopped"):
        raise SystemExit(STOPPED)
    return result


@contextlib.contextmanager
def one_line_errors(debug: bool = False):
    """Wrong input and what the machine refuses end the process with one line, not a traceback."""
    try:
        yield
    except Exception as error:
        if not _reason(error):
            raise
        _tell(error, int(os.environ["RANK"]) if distributed.launched() else 0, debug)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _tell(error: Exception, rank: int, debug: bool = False) -> None:
    """One line, or the traceback of a mistake in the code.

    What all ranks meet alike is told once: when rank 0 has told it, the launcher ends the others.
    Each is told that one rank meets alone.
    """
    sys.stdout.flush()
    reason = _reason(error)
    if reason == LOST or (reason and rank):
        time.sleep(SILENCE)
    if reason and not debug:
        print(f"error: {reason}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def _reason(error: Exception) -> str:
    """One line for what is no mistake in the code; empty for what is."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | RunError):
        return text
    if isinstance(error, OSError):
        return f"{error.filename or 'reading or writing'}: {error.strerror or text}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: lower --batch-size, --width or --crop-size ({text[:80]})"
    if torch.distributed.is_initialized() and any(words in text for words in DISCONNECTED):
        return LOST
    return ""
