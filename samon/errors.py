"""All ways to end: 0 done; 1 a fault, in one line; 2 a user's mistake; 128 + n stopped by signal n, state saved."""

import importlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch


class UserError(ValueError):
    """A user's mistake: one line that says what is wrong, where, and what to do; scripts print it and exit with 2."""


class RunError(RuntimeError):
    """A fault while running (disk full, diverged); its one line names the last good checkpoint."""


class Stopped(Exception):
    """A signal asked the run to stop; the state is saved."""

    def __init__(self, signum: int, saved: str) -> None:
        super().__init__(f"stopped by signal {signum}; continue with --resume {saved}")
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


def run_script(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and exit; user errors and faults print one `error:` line instead of a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8 keep their bytes
    try:
        main()
        status = 0
    except UserError as error:
        status = _say(error, 2)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        status = _say(error, 2)
    except RunError as error:
        status = _say(error, 1)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        status = stop.status
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def _say(error: BaseException, status: int) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status
