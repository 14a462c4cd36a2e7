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
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SILENCE = 2  # seconds, more than a launcher takes to end the other processes of a failed one
DISCONNECTED = ("onnection closed by peer", "onnection reset", "imed out", "pair closure")
LOST = "lost touch with another process: it has failed, or stood still for --dist-timeout seconds"


class UserError(Exception):
    """Wrong input: one line that names the flag, file or value and what to do next."""


class RunError(Exception):
    """A run that can't go on: one line with the reason, where it stands and what to do next."""


class Stopped(Exception):
    """A run that ends before its last step, saved; --resume goes on.

    asked   by a signal, not by --stop-after
    """

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
        print(f"warning: {text}", file=sys.stderr)


def printable(name: str) -> str:
    """A name from a disk for people and pages: what can't be shown or encoded is escaped."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in name)


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
            if not reason_of(error):
                raise
            tell(error, 0 if first_process() else 1, debug)
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


def tell(error: Exception, rank: int, debug: bool = False) -> None:
    """One line, or the traceback of a mistake in the code.

    Errors common to all ranks are printed by rank 0, after which the launcher ends the others; an
    error on one rank is always printed.
    """
    sys.stdout.flush()
    reason = reason_of(error)
    if reason == LOST or (reason and rank):
        time.sleep(SILENCE)
    if reason and not debug:
        print(f"error: {reason}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)


def reason_of(error: Exception) -> str:
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
