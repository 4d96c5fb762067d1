"""Exit codes: 0 success, 1 runtime error, 2 mistake in settings or data, 128 + n stopped by signal n."""

import difflib
import errno
import importlib
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

# Of the operating system's errors, those of a path that cannot be used as it was given.
_PATH_MISTAKES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG}


class UserError(ValueError):
    """A user's mistake: one line that says what is wrong, where, and what to do; scripts print it and exit with 2."""


class RunError(RuntimeError):
    """A fault while running (disk full, diverged); its one line names the last good checkpoint."""


class Stopped(Exception):
    """A signal asked the program to stop; `how` says how to continue it."""

    def __init__(self, signum: int, how: str) -> None:
        super().__init__(f"stopped by signal {signum}; {how}")
        self.status = 128 + signum


@contextmanager
def user_errors(what: str = "") -> Iterator[None]:
    """Errors of the libraries that come from a user's settings, as UserError: for the building phase only."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError, KeyError, ImportError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {text}" if what else text) from error


def refuse(mistakes: Mapping[str, Any]) -> None:
    """Raises:
    UserError: the first of these messages whose mistake is made.
    """
    for message, made in mistakes.items():
        if made:
            raise UserError(message)


def needed(module: str, otherwise: str) -> Any:
    """A module of a package that not everybody has installed.

    Raises:
        UserError: ``otherwise``, if it is not there.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(otherwise) from None


def require_matplotlib() -> Any:
    """The package that draws figures, with its module `figure`.

    Raises:
        UserError: it is not installed.
    """
    needed("matplotlib.figure", "figures need matplotlib; run: pip install 'samon-timm[report]'")
    return sys.modules["matplotlib"]


def nearest(word: Any, known: Iterable[Any]) -> str:
    """`; did you mean 'x'?` for the known word that a wrong one abbreviates or is closest to, or nothing."""
    words = [str(item) for item in known]
    longer = sorted((item for item in words if len(str(word)) > 2 and item.startswith(str(word))), key=len)
    close = longer or difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def run_script(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and exit; user errors and those of the operating system print one `error:` line, no traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8 keep their bytes
    threading.excepthook = _thread_error
    try:
        main()
        sys.stdout.flush()
        status = 0
    except UserError as error:
        status = _print_error(str(error), 2)
    except RunError as error:
        status = _print_error(str(error), 1)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_closed():
            status = 128 + signal.SIGPIPE  # `| head` has seen enough
        else:
            status = _print_error(os_error_text(error), 2 if error.errno in _PATH_MISTAKES else 1)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        status = stop.status
    except KeyboardInterrupt:
        print(f"stopped by signal {signal.SIGINT:d}", file=sys.stderr)
        status = 128 + signal.SIGINT
    sys.stderr.flush()
    sys.exit(status)


def os_error_text(error: OSError) -> str:
    """An error of the operating system in one line: its file first, without the number."""
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    named = isinstance(error.filename, str | bytes | os.PathLike)
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if named else error.strerror


def _thread_error(error: threading.ExceptHookArgs) -> None:
    """A line for errors of the operating system, such as those of TensorBoard's thread, which the next write raises."""
    if isinstance(error.exc_value, OSError):
        print(f"warning: {os_error_text(error.exc_value)}", file=sys.stderr)
    else:
        threading.__excepthook__(error)


def _stdout_closed() -> bool:
    """Whether nothing reads standard output any more; if so, what is left of it goes nowhere."""
    poll = select.poll()
    poll.register(1, 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return closed


def _print_error(text: str, status: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return status
