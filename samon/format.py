"""How numbers and names are printed."""

import textwrap

PERCENT = ("top-1", "top-5", "top1", "top5", "ece", "mce", "ce")


def metric_format(metric: str) -> str:
    """The format specification of a metric: 2 decimals for percentages, 4 for losses, 4 significant digits else."""
    if "loss" in metric:
        return ".4f"
    return ".2f" if metric.removeprefix("eval_").removeprefix("robust_") in PERCENT else ".4g"


def quantity(value: float, unit: str, base: int = 1000) -> str:
    """A value with the prefix of its size: `quantity(4.1e9, "FLOP")` is '4.1 GFLOP'; `base=1024` for MiB and GiB."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"] if base == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
    power = 0
    while abs(value) >= base and power < len(prefixes) - 1:
        value, power = value / base, power + 1
    return f"{value:.4g} {prefixes[power]}{unit}"


def wrapped(name: str, width: int) -> str:
    """A path in lines of at most `width` characters, so that it stays within its panel."""
    return textwrap.fill(name.replace("/", "/ "), width).replace("/ ", "/")
