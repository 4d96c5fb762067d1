"""Errors that the programs print as one line, without a traceback."""

import difflib
import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class UserError(ValueError):
    """A user's mistake: one line that says what is wrong, where, and what to do. Programs print it and exit with 2."""


class RunError(RuntimeError):
    """A failure at run time (disk full, divergence): one line that names the last good checkpoint."""


class Stopped(Exception):
    """A signal stopped the program; `how` says how to resume."""

    def __init__(self, signum: int, how: str) -> None:
        super().__init__(f"stopped by signal {signum}; {how}")
        self.status = 128 + signum


@contextmanager
def reraise_as_user_error(what: str) -> Iterator[None]:
    """Reraise library errors as UserError, while a program is built from the user's settings."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError, KeyError, ImportError) as error:
        raise UserError(f"{what}: {error_line(error)}") from error


def require_package(module: str, message: str) -> Any:
    """Import a module of an optional package.

    Raises:
        UserError: `message`, if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(message) from None


def require_matplotlib() -> Any:
    """Import `matplotlib.figure`; raise UserError if matplotlib is not installed."""
    return require_package("matplotlib.figure", "figures need matplotlib; run: pip install 'samon-timm[report]'")


def nearest(word: Any, known: Iterable[Any]) -> str:
    """`; did you mean 'x'?` for the known word that starts with `word` or is most similar; '' if none is."""
    words = [str(item) for item in known]
    longer = sorted((item for item in words if len(str(word)) > 2 and item.startswith(str(word))), key=len)
    close = longer or difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def error_line(error: Exception, limit: int = 300) -> str:
    """The first characters of an error's text as one line; its class if it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def os_error_text(error: OSError) -> str:
    """An operating system error as one line: the file and the reason, without the error number."""
    if error.errno is None or error.strerror is None:
        return str(error) or type(error).__name__
    named = isinstance(error.filename, str | bytes | os.PathLike)
    return f"{os.fsdecode(error.filename)}: {error.strerror}" if named else error.strerror
