"""Command lines of which the part after `--` belongs to another command."""

import argparse
import sys

from samon.errors import UserError


def parse_up_to_dashes(parser: argparse.ArgumentParser, argv: list[str] | None, other: str) -> argparse.Namespace:
    """The arguments before `--`, and as `after` the words after it, which are flags of the command ``other``.

    Raises:
        UserError: a word before `--` that is not this command's.
    """
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:cut])
    if unknown:
        words = " ".join(unknown)
        raise UserError(f"{words}: no flag of {parser.prog}; flags of {other} go after --, as in `... -- {words}`")
    args.after = argv[cut + 1 :]
    return args
