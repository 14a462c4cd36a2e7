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
from training.run_folder import check_free, check_place
from training.stopping import STOPPED
from training.weights import fetch

SILENCE = 2  # seconds, more than a launcher takes to end the other processes of a failed one
DISCONNECTED = ("onnection closed by peer", "onnection reset", "imed out", "pair closure")
LOST = "lost touch with another process: it has failed, or stood still for --dist-timeout seconds"


def prepare_data(config) -> None:
    """Download and pack the data set."""
    datasets.prepare(config.data)


def prepare_start(config) -> None:
    """The data set, and the published weights that --init names."""
    prepare_data(config)
    fetch(config.encoder)


def execute(
    configure: Callable[[list[str]], object],
    run: Callable[[object, Processes], dict],
    argv: list[str] | None = None,
    prepare: Callable[[object], None] = prepare_data,
) -> dict:
    """Read the settings, start the processes, call `run(config, processes)`, return its result.

    prepare   function of the settings that fetches what is missing, before a process group exists
    Wrong input is one line on stderr, before torchrun, data or a network are touched.
    """
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors("--debug" in argv, printed=False):
        config = configure(argv)
        out, restarted = Path(config.run.out), distributed.restarted()
        if restarted and (not config.run.resume or list(out.glob("checkpoints/step-*.pt"))):
            config.run.resume = "auto"  # after a crash the launcher types what was typed at first
        resume = config.run.resume
        check_free(out, bool(resume), config.run.overwrite)
        check_place(out, Path(config.data.data_root), config.run.overwrite)
        if resume not in ("", "auto") and not Path(resume).is_file():
            raise UserError(f"--resume {resume}: no such file")
        distributed.relaunch_if_needed(config.run.gpus, config.run.device, argv)
        distributed.end_with_launcher()
        prepare(config)
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
def one_line_errors(debug: bool = False, printed: bool = True):
    """Wrong input and what the machine refuses end the process with one line, not a traceback.

    printed   whether the result is what is printed: on a full disk that is an error as well
    """
    out, err = Console(sys.stdout), Console(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
            out.flush()
            if printed and out.lost and not isinstance(out.lost, BrokenPipeError):
                raise out.lost
        except Exception as error:
            if not _reason(error):
                raise
            _tell(error, 0 if distributed.first_process() else 1, debug)
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:  # what can't be written later than this changes Python's exit code
            out.flush()
            err.flush()


class Console:
    """A text stream on which printing never fails.

    Characters that it can't encode are escaped.  After the first failure (a closed terminal, a pipe
    that nobody reads, a full disk; it is kept as `lost`) all further text is dropped.

    stream   None where it was closed before the start, as by >&-
    """

    def __init__(self, stream) -> None:
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")
        self.lost: OSError | None = None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        code = self.stream.encoding or "utf-8"
        self._attempt(self.stream.write, text.encode(code, "backslashreplace").decode(code))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, function, *arguments) -> None:
        try:
            function(*arguments)
        except OSError as error:
            self.lost = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def _tell(error: Exception, rank: int, debug: bool = False) -> None:
    """One line, or the traceback of a mistake in the code.

    Errors common to all ranks are printed by rank 0, after which the launcher ends the others; an
    error on one rank is always printed.
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
    """One-line message for expected failures; empty for bugs."""
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
