"""What a user gets to see when something goes wrong: one line, and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong input, 75 stopped by a signal (saved; --resume goes on).
"""

import contextlib
import functools
import os
import sys
import time
import traceback

import torch

STOPPED = 75  # exit code (EX_TEMPFAIL)
BROKEN_PIPE = 141  # exit code that shells give for SIGPIPE
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SILENCE = 2  # seconds, more than a launcher takes to end the other processes of a failed one
LOST = "lost touch with another process: it has failed, or stood still for --dist-timeout seconds"


class UserError(Exception):
    """Wrong input: one line that names the flag, file or value and what to do next."""


class RunError(Exception):
    """A run that can't go on: one line with the reason, where it stands and what to do next."""


class Stopped(Exception):
    """A run that ends before its last step, saved; `asked`: by a signal, not by --stop-after."""

    def __init__(self, asked: bool) -> None:
        super().__init__("stopped; go on with --resume")
        self.asked = asked


def launched() -> bool:
    """True under torchrun; stray RANK variables alone do not count."""
    return all(name in os.environ for name in ("TORCHELASTIC_RUN_ID", *LAUNCHER))


def first_process() -> bool:
    """Whether this is the process that prints; known before there is a process group."""
    return not launched() or os.environ["RANK"] == "0"


@functools.cache  # the same text once a process
def warn_once(text: str) -> None:
    """One line on stderr from the first process."""
    if first_process():
        put(f"warning: {text}", sys.stderr)


def printable(name: str) -> str:
    """A name from a disk for people and pages: what can't be shown or encoded is escaped."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in name)


def put(text: str, stream, end: str = "\n") -> None:
    """Print at once; where that fails, drop this text and all that is printed there later.

    A run goes on without its messages: the terminal was closed, the disk is full, nobody reads.
    """
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def one_line_errors(debug: bool = False):
    """Context in which wrong input and what the machine refuses become one line, not a traceback.

    Characters that the terminal lacks are escaped.  Text that can't be written is an error, unless
    it was printed by `put`.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed before the start, as by >&-
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if hasattr(getattr(sys, name), "reconfigure"):  # not in a notebook
            getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as `head`, has read enough
        put("", sys.stdout, end="")  # or Python fails to write the rest when it ends
        raise SystemExit(BROKEN_PIPE) from None
    except Exception as error:
        if not reason_of(error):
            raise
        tell(error, 0 if first_process() else 1, debug)
        raise SystemExit(2 if isinstance(error, UserError) else 1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def tell(error: Exception, rank: int, debug: bool = False) -> None:
    """Print one line, or the traceback of a mistake in the code.

    Errors common to all ranks are printed by rank 0, after which the launcher ends the others; an
    error on one rank is always printed.
    """
    put("", sys.stdout, end="")  # what is still in its buffer
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
