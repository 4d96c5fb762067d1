"""How a flag is declared: one row, from which --help, YAML keys, --print-config, args.yaml and docs derive.

The rows are in `rows_timm.py` (timm's names and meaning) and `rows.py` (what this project adds).
"""

import argparse
import ast
import logging
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from timm.utils.distributed import world_info_from_env

from samon.errors import UserError, nearest

log = logging.getLogger("samon")

TRAIN_ONLY, VALIDATE_ONLY, BOTH = ("train",), ("validate",), ("train", "validate")

# Ranges a number can be held to: text -> test. Rows name them, so docs and error messages say the same thing.
RANGES: dict[str, Callable[[float], bool]] = {
    ">= 0": lambda v: v >= 0,
    "> 0": lambda v: v > 0,
    ">= 1": lambda v: v >= 1,
    "in [0, 1]": lambda v: 0 <= v <= 1,
    "in (0, 1]": lambda v: 0 < v <= 1,
    "in [0, 1)": lambda v: 0 <= v < 1,
}


def kwargs(value: Any) -> dict[str, Any]:
    """`['a=1', 'b=x']` or a mapping -> dict; values are Python literals or else text (timm's ParseKwargs)."""
    if isinstance(value, Mapping):
        return dict(value)
    pairs: dict[str, Any] = {}
    for item in [value] if isinstance(value, str) else value:
        key, sign, text = item.partition("=")
        if not sign or not key:
            raise ValueError(f"{item!r} is not KEY=VALUE")
        try:
            pairs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            pairs[key] = text
    return pairs


@dataclass(frozen=True)
class Flag:
    """One setting: `--name` on the command line, `name` with `_` for `-` in YAML."""

    name: str
    type: Callable[[Any], Any]  # bool is a switch; `kwargs` takes KEY=VALUE pairs
    default: Any
    help: str
    nargs: str | int | None = None
    choices: tuple[Any, ...] = ()
    short: str = ""
    range: str = ""  # a key of RANGES, applied to the number or to each of a list
    const: Any = None  # value of a bare `--name` when nargs is '?'
    refused: str = ""  # why it cannot be honoured here, and what to use instead
    switch: str = ""  # key of the refused flag without which this refused one has no effect
    positional: bool = False
    programs: tuple[str, ...] = TRAIN_ONLY
    in_validate: Any = ...  # the default of validate.py, where it is another one
    aliases: tuple[str, ...] = ()  # timm's other names
    old_name: str = ""  # earlier name, hidden; accepted for one release
    old_values: Mapping[str, str] = field(default_factory=dict)  # earlier values (up to a colon) -> new ones

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def flag(self) -> str:
        return self.name if self.positional else f"--{self.name}"

    def parse(self, value: Any) -> Any:
        """A YAML or command-line value in this flag's type; raises UserError naming the flag."""
        if value is None or value == self.default:
            return value
        try:
            return self._convert(value)
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.flag}: {error}") from None

    def given(self, value: Any) -> Any:
        """`parse` for the command line, where a refused flag may at most name its default."""
        if not self.refused:
            return self.parse(value)
        if value != [str(self.default)]:
            raise UserError(f"{self.flag} is not honoured: {self.refused}")
        return self.default

    def _convert(self, value: Any) -> Any:
        if self.type is kwargs:
            return kwargs(value)
        if self.nargs in ("+", "*") or isinstance(self.nargs, int):
            items = list(value) if isinstance(value, list | tuple) else [value]
            if isinstance(self.nargs, int) and len(items) != self.nargs:
                raise ValueError(f"takes {self.nargs} values, got {len(items)}")
            return [self._scalar(item) for item in items]
        return self._scalar(value)

    def _scalar(self, value: Any) -> Any:
        if self.type is bool:
            if not isinstance(value, bool):
                raise ValueError(f"takes true or false, got {value!r}")
            return value
        wrong_kind = isinstance(value, bool | list | dict) or (self.type is int and isinstance(value, float))
        try:
            if wrong_kind:
                raise ValueError
            typed = self.type(value)
        except ValueError as error:
            plain = self.type in (int, float, str)
            noun = "an int" if self.type is int else f"a {self.type.__name__}"
            raise ValueError(f"{value!r} is not {noun}" if plain else str(error)) from None
        if self.choices and typed not in self.choices:
            names = ", ".join(map(repr, self.choices))
            raise ValueError(f"{typed!r} is not one of {names}{nearest(typed, self.choices)}")
        if isinstance(typed, float) and not math.isfinite(typed):
            raise ValueError(f"{typed} is not a value; give a finite number")
        if self.range and isinstance(typed, int | float) and not RANGES[self.range](typed):
            raise ValueError(f"must be {self.range}, got {typed}")
        return typed


Groups = Mapping[str, tuple[Flag, ...]]
LAUNCHER = ("--local-rank", "--local_rank")  # torch.distributed.launch adds it; the environment says the same


def of_program(groups: Groups, program: str) -> Groups:
    """The rows of one program (`train` or `validate`), with its defaults."""

    def row(flag: Flag) -> Flag:
        return flag if program == "train" or flag.in_validate is ... else replace(flag, default=flag.in_validate)

    chosen = {title: tuple(row(flag) for flag in rows if program in flag.programs) for title, rows in groups.items()}
    return {title: rows for title, rows in chosen.items() if rows}


def by_key(groups: Groups) -> dict[str, Flag]:
    return {flag.key: flag for rows in groups.values() for flag in rows}


def rename_old(settings: Mapping[str, Any], flags: Mapping[str, Flag], warn: bool = False) -> dict[str, Any]:
    """The settings with the names and values of earlier releases replaced by today's."""
    old_keys = {flag.old_name.replace("-", "_"): key for key, flag in flags.items() if flag.old_name}
    renamed = {}
    for old, value in settings.items():
        key = old_keys.get(old, old)
        new = value
        if key in flags and isinstance(value, str):
            head, colon, tail = value.partition(":")
            new = flags[key].old_values.get(head, head) + colon + tail
        renamed[key] = new
        if warn and (key, new) != (old, value) and world_info_from_env()[1] == 0:
            before, after = f"--{old.replace('_', '-')}", flags[key].flag
            if new != value:
                before, after = f"{before} {value}", f"{after} {new}"
            log.warning("deprecated: %s is now %s; the old spelling goes with the next release", before, after)
    return renamed


def program() -> str:
    """The command that started this process, without directories: `python train.py`, `samon-train`, `python -m ...`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    name = Path(sys.argv[0]).name
    return f"python {name}" if name.endswith(".py") else name


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake as one UserError instead of a usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parser(groups: Groups, description: str) -> Parser:
    """The parser of `groups`; values stay text and only what was given appears in the result."""
    result = Parser(
        prog=program(),
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument(*LAUNCHER, help=argparse.SUPPRESS)
    names = {flag.name for rows in groups.values() for flag in rows}
    for title, rows in groups.items():
        group = result.add_argument_group(title)
        for flag in rows:
            _add(group, flag)
            if flag.old_name:
                dest = flag.old_name.replace("-", "_")
                group.add_argument(f"--{flag.old_name}", dest=dest, nargs=flag.nargs, help=argparse.SUPPRESS)
            off = f"no-{flag.name}"
            if flag.type is bool and not flag.name.startswith("no-") and off not in names:  # takes back a file's
                group.add_argument(f"--{off}", action="store_false", dest=flag.key, help=argparse.SUPPRESS)
    return result


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    text = f"refused: {flag.refused}" if flag.refused else flag.help
    if flag.default not in (None, False, "", [], {}) and not flag.refused:
        text += f" (default: {flag.default})"
    text = text.replace("%", "%%")
    if flag.positional:
        group.add_argument(flag.name, nargs="?", metavar="DIR", help=text)
    elif flag.type is bool:
        group.add_argument(flag.flag, action="store_true", dest=flag.key, help=text)
    else:
        names = [f"-{flag.short}"] * bool(flag.short) + [flag.flag, *(f"--{alias}" for alias in flag.aliases)]
        metavar = flag.name.rsplit("-", 1)[-1].upper()
        nargs = "*" if flag.type is kwargs or flag.refused else flag.nargs
        extra = {"const": flag.const} if nargs == "?" else {}
        group.add_argument(*names, dest=flag.key, nargs=nargs, metavar=metavar, help=text, **extra)


def parse_command_line(groups: Groups, argv: list[str] | None, description: str) -> dict[str, Any]:
    """`{key: value}` of what the command line gives; an unknown flag is an error naming the nearest one."""
    given, rest = parser(groups, description).parse_known_args(argv)
    known = by_key(groups)
    given = argparse.Namespace(**rename_old(vars(given), known, warn=True))
    if rest:
        word = next((item for item in rest if item.startswith("-")), rest[0])
        names = [flag.flag for flag in known.values()]
        raise UserError(f"unknown argument {word}{nearest(word.split('=')[0], names)} (see --help)")
    return {key: known[key].given(value) for key, value in vars(given).items() if key in known}


def markdown(groups: Groups) -> str:
    """The flag tables of docs/flags.md."""
    lines = []
    for title, rows in groups.items():
        lines += [f"## {title}", "", "| flag | default | meaning |", "|---|---|---|"]
        for flag in rows:
            default = "" if flag.default in (None, False, "", [], {}) else f"`{flag.default}`"
            values = f" One of {', '.join(f'`{c}`' for c in flag.choices)}." if flag.choices else ""
            limits = f" Must be {flag.range}." if flag.range else ""
            meaning = f"**Refused**: {flag.refused}." if flag.refused else f"{flag.help}.{values}{limits}"
            lines.append(f"| `{flag.flag}` | {default} | {meaning} |".replace("  ", " "))
        lines.append("")
    return "\n".join(lines)
