#!/usr/bin/env python3
"""Update the tables of flags in docs/flags.md and docs/flags_validate.md from the rows of samon/trainer.

    python tools/flag_tables.py

Run it after a change of samon/trainer/flag_rows.py or flag_rows_timm.py; a test compares the pages with the rows.
"""

import argparse
from pathlib import Path

from samon.trainer.flag_rows import TRAIN, VALIDATE
from samon.trainer.flags import Flag, Sections

ROOT = Path(__file__).parents[1]


PAGES: dict[str, tuple[Sections, Sections]] = {"flags": (TRAIN, {}), "flags_validate": (VALIDATE, TRAIN)}


def row(flag: Flag) -> str:
    """The row of a supported flag."""
    default = f"`{flag.default}`" if flag.has_default else ""
    values = f" One of {', '.join(f'`{c}`' for c in flag.choices)}." if flag.choices else ""
    limits = f" Must be {flag.range}." if flag.range else ""
    return f"| `{flag.flag}` | {default} | {flag.help}.{values}{limits} |".replace("  ", " ")


def markdown(sections: Sections, other: Sections) -> str:
    """The tables of a page. Flags whose row is also on the `other` page are only named there; refused flags with the
    same reason share a row."""
    known = {row(flag) for rows in other.values() for flag in rows if not flag.refused}
    lines, shared = [], []
    for title, rows in sections.items():
        shared += [f"`{flag.flag}`" for flag in rows if not flag.refused and row(flag) in known]
        own = [row(flag) for flag in rows if not flag.refused and row(flag) not in known]
        for reason in dict.fromkeys(flag.refused for flag in rows if flag.refused):
            names = ", ".join(f"`{flag.flag}`" for flag in rows if flag.refused == reason)
            own.append(f"| {names} | | **Refused**: {reason}. |")
        if own:
            lines += [f"## {title}", "", "| flag | default | meaning |", "|---|---|---|", *own, ""]
    if shared:
        lines += [
            "## Flags of train.py",
            "",
            f"With the [same meaning and default](flags.md): {', '.join(shared)}.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Replace the tables; the text before the first one stays."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, (sections, other) in PAGES.items():
        page = ROOT / f"docs/{name}.md"
        page.write_text(page.read_text().partition("## ")[0] + markdown(sections, other).rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
