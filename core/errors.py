"""Expected errors: one line for the user, and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong input, 75 saved and stopped by a signal (--resume continues).
"""

import contextlib
import functools
import os
import sys
import time
import traceback

import torch

STOPPED = 75  # exit code (EX_TEMPFAIL)
BROKEN_PIPE = 141  # exit code that shells report for SIGPIPE
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SILENCE = 2  # seconds before another rank's error; torchrun ends that rank sooner if rank 0 failed
LOST = "lost touch with another process: it failed, or stalled for --dist-timeout seconds"


class UserError(Exception):
    """Wrong input: one line that names the flag, file or value and what to do next."""


class RunError(Exception):
    """A run that can't continue: one line with the reason and what to do next."""


class NotFinite(RunError):
    """A loss or weight of a run has become NaN or infinite."""


class Stopped(Exception):
    """A run has saved and ends before its last step; `asked`: by a signal, not --stop-after."""

    def __init__(self, asked: bool) -> None:
        super().__init__("stopped; go on with --resume")
        self.asked = asked


def launched() -> bool:
    """True under torchrun; stray RANK variables alone do not count."""
    return all(name in os.environ for name in ("TORCHELASTIC_RUN_ID", *LAUNCHER))


def first_process() -> bool:
    """Whether this is rank 0, which prints; works before the process group exists."""
    return not launched() or os.environ["RANK"] == "0"


@functools.cache  # prints the same text only once
def warn_once(text: str) -> None:
    """One line on stderr from the first process; a run's own warnings use run_folder.warn."""
    if first_process():
        put(f"warning: {text}", sys.stderr)


def printable(name: str) -> str:
    """A file name for the screen: characters that can't be printed or encoded are escaped."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in name)


def put(text: str, stream, end: str = "\n") -> None:
    """Print and flush; if that fails, discard this text and all later output to `stream`.

    A run then survives a closed terminal or pipe and a full disk.
    """
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def one_line_errors(debug: bool = False):
    """Context that turns expected errors into one line on stderr and an exit code.

    Characters that the terminal can't encode are escaped.  A failing stdout is an error too, except
    for text printed by `put`.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start, as with >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if hasattr(getattr(sys, name), "reconfigure"):  # not in a notebook
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        put("", sys.stdout, end="")  # discard the rest, which Python could not flush at exit
        raise SystemExit(BROKEN_PIPE) from None
    except Exception as error:
        if not reason_of(error):
            raise
        tell(error, 0 if first_process() else 1, debug)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def tell(error: Exception, rank: int, debug: bool = False) -> None:
    """Print one line for an expected error, the traceback for a bug.

    Errors common to all ranks are printed by rank 0: the others wait, and the launcher ends them
    when rank 0 exits.  An error on one rank is always printed, LOST only after its cause.
    """
    put("", sys.stdout, end="")  # flush what was printed before
    reason = reason_of(error)
    if reason.startswith(LOST) or (reason and rank):
        time.sleep(SILENCE)
    text = "".join(traceback.format_exception(error))
    put(f"error: {reason}" if reason and not debug else text, sys.stderr)


def reason_of(error: Exception) -> str:
    """One-line message for expected failures; empty for bugs."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError | RunError):
        return text
    if isinstance(error, OSError):
        return f"{error.filename or 'reading or writing'}: {error.strerror or text}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: lower --batch-size, --width or --crop-size ({text[:80]})"
    if isinstance(error, torch.distributed.DistError) or "/gloo/" in text:  # gloo has no error type
        return f"{LOST} ({text[:200]})"
    return ""
