"""The errors that a user sees as one line, without a traceback."""

import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


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
def reraise_as_user_error(what: str = "") -> Iterator[None]:
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


def require_package(module: str, otherwise: str) -> Any:
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
    require_package("matplotlib.figure", "figures need matplotlib; run: pip install 'samon-timm[report]'")
    return sys.modules["matplotlib"]


def nearest(word: Any, known: Iterable[Any]) -> str:
    """`; did you mean 'x'?` for the known word that a wrong one abbreviates or is closest to, or nothing."""
    words = [str(item) for item in known]
    longer = sorted((item for item in words if len(str(word)) > 2 and item.startswith(str(word))), key=len)
    close = longer or difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def os_error_text(error: OSError) -> str:
    """An error of the operating system in one line: its file first, without the number."""
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    named = isinstance(error.filename, str | bytes | os.PathLike)
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if named else error.strerror
