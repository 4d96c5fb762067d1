#!/usr/bin/env python3
"""Update the tables of flags in docs/flags.md and docs/flags_validate.md from the rows of samon/trainer.

    python tools/flag_tables.py

Run it after a change of samon/trainer/flag_rows.py or flag_rows_timm.py; a test compares the pages with the rows.
"""

import argparse
from pathlib import Path

from samon.trainer.flag_rows import TRAIN, VALIDATE
from samon.trainer.flags import Sections

ROOT = Path(__file__).parents[1]


def markdown(sections: Sections) -> str:
    """The tables of docs/flags.md. Refused flags with the same reason share a row."""
    lines = []
    for title, rows in sections.items():
        lines += [f"## {title}", "", "| flag | default | meaning |", "|---|---|---|"]
        for flag in rows:
            if not flag.refused:
                default = f"`{flag.default}`" if flag.has_default else ""
                values = f" One of {', '.join(f'`{c}`' for c in flag.choices)}." if flag.choices else ""
                limits = f" Must be {flag.range}." if flag.range else ""
                lines.append(f"| `{flag.flag}` | {default} | {flag.help}.{values}{limits} |".replace("  ", " "))
        for reason in dict.fromkeys(flag.refused for flag in rows if flag.refused):
            names = ", ".join(f"`{flag.flag}`" for flag in rows if flag.refused == reason)
            lines.append(f"| {names} | | **Refused**: {reason}. |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Replace the tables; the text before the first one stays."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, sections in (("flags.md", TRAIN), ("flags_validate.md", VALIDATE)):
        page = ROOT / "docs" / name
        page.write_text(page.read_text().partition("## ")[0] + markdown(sections).rstrip("\n") + "\n")


if __name__ == "__main__":
    main()
