"""Long work shows itself: a bar on a terminal, elsewhere a line once a minute."""

import io
import logging
import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS = 60.0  # between lines


def on_terminal() -> bool:
    """Whether stderr is a terminal that a bar fits on: some say that they have no rows or no columns."""
    try:
        return sys.stderr.isatty() and 0 not in os.get_terminal_size(sys.stderr.fileno())
    except io.UnsupportedOperation:  # not a file: its `isatty` decides
        return True
    except OSError:
        return False


def bar(name: str, total: int, unit: str, items: Iterable[Any] | None = None, *, show: bool = True, **how: Any) -> tqdm:
    """What has been done of `total`, the pace and the time left, of this work from its start on.

    It goes over `items`, or is moved by its `update`. `how`: further arguments of tqdm.
    """
    kind = tqdm if on_terminal() else Lines
    return kind(items, name, total, unit=unit, leave=False, disable=not show, smoothing=0, dynamic_ncols=True, **how)


class Lines(tqdm):
    """tqdm whose every showing is a line of its own, a minute apart; work of less than a minute says nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS, "file": io.StringIO()}
        kwargs["bar_format"] = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
        super().__init__(*args, **kwargs)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # '' clears the line at the end
            print(self, file=sys.stderr, flush=True)


class Console(logging.StreamHandler):
    """Log lines on stderr, above the bars; what a bar shows anyway (`extra={'shown': True}`) is not repeated."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "shown", False):
            with tqdm.external_write_mode(file=self.stream):
                super().emit(record)
