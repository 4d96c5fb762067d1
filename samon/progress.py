"""Progress bars, log lines above them, and how numbers are printed."""

import io
import logging
import os
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0  # between progress lines where stderr is no terminal
PERCENTAGES = ("top1", "top5", "ece", "mce", "ce")
PREFIXES = {1000: ("", "k", "M", "G", "T", "P", "E"), 1024: ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")}


def is_terminal() -> bool:
    """Whether stderr is a terminal with room for a bar (some report zero rows or columns)."""
    try:
        return sys.stderr.isatty() and 0 not in os.get_terminal_size(sys.stderr.fileno())
    except io.UnsupportedOperation:  # not a file: its `isatty` decides
        return True
    except OSError:
        return False


def progress_bar(
    name: str, total: int, unit: str, items: Iterable[object] | None = None, *, show: bool = True, initial: int = 0
) -> tqdm:
    """A bar with rate and remaining time on a terminal, elsewhere a line per minute. Iterates over `items`, or is
    advanced by `update`. `initial` counts as done but not toward the rate."""
    kind = tqdm if is_terminal() else LineProgress
    return kind(
        items, name, total, unit=unit, leave=False, disable=not show, smoothing=0, dynamic_ncols=True, initial=initial
    )


class LineProgress(tqdm):
    """tqdm that prints a new line once a minute, and nothing for work of less than a minute."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= dict.fromkeys(("mininterval", "maxinterval", "delay"), LINE_SECONDS)
        kwargs["bar_format"] = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
        super().__init__(*args, **kwargs | {"file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # '' clears the line at the end
            print(self, file=sys.stderr, flush=True)


class ConsoleHandler(logging.StreamHandler):
    """Logs to stderr above the bars. Records with `extra={'shown': True}`, which a bar displays anyway, are skipped."""

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "shown", False):
            with tqdm.external_write_mode(file=self.stream):
                super().emit(record)


def plural(count: int, noun: str) -> str:
    """`1 epoch`, `2 epochs`."""
    return f"{count} {noun}{'s' * (count != 1)}"


def metric_format(metric: str) -> str:
    """Format specification of a metric: 2 decimals for percentages, 4 for losses, otherwise 4 significant digits."""
    if "loss" in metric:
        return ".4f"
    name = metric.removeprefix("eval_").removeprefix("early_stopped_").removeprefix("robust_")
    return ".2f" if name in PERCENTAGES else ".4g"


def format_quantity(value: float, unit: str, base: int = 1000) -> str:
    """Value with a unit prefix: `format_quantity(4.1e9, "FLOP")` is '4.1 GFLOP'; `base=1024` gives MiB and GiB."""
    power = 0
    while abs(value) >= base and power < len(PREFIXES[base]) - 1:
        value, power = value / base, power + 1
    return f"{value:.4g} {PREFIXES[base][power]}{unit}"


def wrap_path(path: str, width: int) -> str:
    """Break a path at its slashes into lines of at most `width` characters."""
    return textwrap.fill(path.replace("/", "/ "), width).replace("/ ", "/")
