"""How a flag is declared: one row, from which --help, YAML keys, --print-config, args.yaml and the docs derive.

The rows are in `flag_rows_timm.py` (timm's names and meanings) and `flag_rows.py` (the flags that this project adds).
"""

import argparse
import ast
import logging
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.utils.distributed import world_info_from_env

from samon.errors import UserError, nearest

log = logging.getLogger("samon")

Settings = dict[str, Any]  # values by key

# Allowed ranges of numbers, by the text that error messages and docs show.
RANGES: dict[str, Callable[[float], bool]] = {
    ">= 0": lambda v: v >= 0,
    "> 0": lambda v: v > 0,
    ">= 1": lambda v: v >= 1,
    ">= 2": lambda v: v >= 2,
    "in [0, 1]": lambda v: 0 <= v <= 1,
    "in (0, 1]": lambda v: 0 < v <= 1,
    "in [0, 1)": lambda v: 0 <= v < 1,
}


def parse_kwargs(value: object) -> Settings:
    """Parse `['a=1', 'b=x']`, or copy a mapping; values are Python literals, or text (timm's ParseKwargs).

    Raises:
        ValueError: an item is not KEY=VALUE.
    """
    if isinstance(value, Mapping):
        return dict(value)
    parsed: Settings = {}
    for item in value if isinstance(value, list | tuple) else [value]:
        key, equals, text = str(item).partition("=")
        if not key or not equals:
            raise ValueError(f"{item!r} is not KEY=VALUE")
        try:
            parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[key] = text
    return parsed


@dataclass(frozen=True)
class Flag:
    """One setting: `--name` on the command line, `name` with `_` for `-` in YAML."""

    name: str
    type: Callable[[Any], object]  # bool makes a switch, `parse_kwargs` takes KEY=VALUE pairs
    default: Any
    help: str
    nargs: str | int | None = None
    choices: tuple[str, ...] = ()
    short: str = ""
    range: str = ""  # a key of RANGES, for the number or each number of a list
    const: str | None = None  # value of a bare `--name`, if nargs is '?'
    refused: str = ""  # why the flag is not supported, and what to use instead
    dependent: bool = False  # has no effect without another refused flag, so a file may set it
    positional: bool = False
    programs: tuple[str, ...] = ("train",)
    aliases: tuple[str, ...] = ()  # timm's other names
    old_name: str = ""  # earlier name, hidden; accepted for one release
    old_values: Mapping[str, str] = field(default_factory=dict)  # earlier values (up to a colon) -> new ones

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def flag(self) -> str:
        return self.name if self.positional else f"--{self.name}"

    @property
    def has_default(self) -> bool:
        """Whether the default is worth showing."""
        return self.default not in (None, False, "", [], {})

    def parse(self, value: object) -> object:
        """Convert a YAML or command-line value to this flag's type.

        Raises:
            UserError: it is not a value of this flag, which the message names.
        """
        if value is None or value == self.default:
            return value
        try:
            if self.type is parse_kwargs:
                return parse_kwargs(value)
            if self.nargs in (None, "?"):
                return self._parse_item(value)
            items = list(value) if isinstance(value, list | tuple) else [value]
            if isinstance(self.nargs, int) and len(items) != self.nargs:
                raise ValueError(f"takes {self.nargs} values, got {len(items)}")
            return [self._parse_item(item) for item in items]
        except (ValueError, TypeError) as error:
            raise UserError(f"{self.flag}: {error}") from None

    def _parse_item(self, value: object) -> object:
        if self.type is bool:
            if not isinstance(value, bool):
                raise ValueError(f"takes true or false, got {value!r}")
            return value
        noun = "an int" if self.type is int else "a float" if self.type is float else "a single value"
        if isinstance(value, bool | list | dict) or (self.type is int and isinstance(value, float)):
            raise ValueError(f"{value!r} is not {noun}")
        try:
            parsed = self.type(value)
        except ValueError as error:
            raise ValueError(f"{value!r} is not {noun}" if self.type in (int, float) else str(error)) from None
        if self.choices and parsed not in self.choices:
            names = ", ".join(map(repr, self.choices))
            raise ValueError(f"{parsed!r} is not one of {names}{nearest(parsed, self.choices)}")
        if isinstance(parsed, float) and not math.isfinite(parsed):
            raise ValueError(f"{parsed} is not allowed; give a finite number")
        if self.range and isinstance(parsed, int | float) and not RANGES[self.range](parsed):
            raise ValueError(f"must be {self.range}, got {parsed}")
        return parsed

    def parse_argument(self, value: object) -> object:
        """`parse` for the command line, where a refused flag may only be given its default."""
        if not self.refused:
            return self.parse(value)
        if value != [str(self.default)]:
            raise UserError(f"{self.flag} is not supported: {self.refused}")
        return self.default

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Declare the flag to argparse; values stay text."""
        text = f"refused: {self.refused}" if self.refused else self.help
        if self.has_default and not self.refused:
            text += f" (default: {self.default})"
        text = text.replace("%", "%%")
        if self.positional:
            group.add_argument(self.name, nargs="?", metavar="DIR", help=text)
        elif self.type is bool and not self.refused:
            group.add_argument(self.flag, action="store_true", dest=self.key, help=text)
        else:
            short = [f"-{self.short}"] if self.short else []
            group.add_argument(
                *(*short, self.flag, *(f"--{alias}" for alias in self.aliases)),
                dest=self.key,
                nargs="*" if self.type is parse_kwargs or self.refused else self.nargs,
                const=self.const,
                metavar=self.name.rsplit("-", 1)[-1].upper(),
                help=text,
            )
        if self.old_name:
            dest = self.old_name.replace("-", "_")
            group.add_argument(f"--{self.old_name}", dest=dest, nargs=self.nargs, help=argparse.SUPPRESS)


Sections = Mapping[str, tuple[Flag, ...]]  # rows by the title of their table


def by_key(sections: Sections) -> dict[str, Flag]:
    """All rows, by their YAML key."""
    return {flag.key: flag for rows in sections.values() for flag in rows}


def rename_old(settings: Mapping[str, object], flags: Mapping[str, Flag], warn: bool = False) -> Settings:
    """Replace the names and values of earlier releases by the current ones; `warn`: with a line on stderr for each."""
    old_keys = {flag.old_name.replace("-", "_"): key for key, flag in flags.items() if flag.old_name}
    renamed: Settings = {}
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
            log.warning("deprecated: %s is now %s; the next release drops the old spelling", before, after)
    return renamed


def program() -> str:
    """The command that started this process, without directories: `python train.py`, `samon-train`, `python -m ...`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name.removesuffix('.__main__')}"
    name = Path(sys.argv[0]).name
    return f"python {name}" if name.endswith(".py") else name


def make_parser(sections: Sections, description: str) -> argparse.ArgumentParser:
    """The parser of the flags; its result contains only what the command line gives."""
    parser = argparse.ArgumentParser(
        prog=program(),
        description=description,
        allow_abbrev=False,
        exit_on_error=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # torch.distributed.launch adds this flag; the environment has the same value.
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)
    names = {flag.name for rows in sections.values() for flag in rows}
    for title, rows in sections.items():
        group = parser.add_argument_group(title)
        for flag in rows:
            flag.add_to(group)
            off = f"no-{flag.name}"  # undoes a switch that a file sets
            if flag.type is bool and not flag.name.startswith("no-") and off not in names:
                group.add_argument(f"--{off}", action="store_false", dest=flag.key, help=argparse.SUPPRESS)
    return parser


def parse_command_line(sections: Sections, argv: list[str] | None, description: str) -> Settings:
    """`{key: value}` of the flags that the command line gives."""
    try:
        namespace, unknown = make_parser(sections, description).parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (see --help)") from None
    flags = by_key(sections)
    if unknown:
        word = next((item for item in unknown if item.startswith("-")), unknown[0])
        names = [flag.flag for flag in flags.values()]
        raise UserError(f"unknown argument {word}{nearest(word.split('=')[0], names)} (see --help)")
    given = rename_old(vars(namespace), flags, warn=True)
    return {key: flags[key].parse_argument(value) for key, value in given.items() if key in flags}
