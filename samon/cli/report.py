"""One page of figures and tables from runs, sweeps and results of validate.py; it opens without a network.

    samon-report output/train/RUN output/sweep/cifar100_resnet results.json -o report.html
    samon-report output/train --export content.json      # the content of the page as JSON
    samon-report content.json -o report.html             # the page from it

The page holds each table as LaTeX and CSV too; --tables DIR writes them to files, --figures DIR the figures.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path

from samon.errors import require_matplotlib
from samon.files import check_writable, write_text
from samon.report.content import export
from samon.report.read import read_sources
from samon.report.tables import tables
from samon.trainer.distributed import log_handler
from samon.trainer.flags import program


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sources", nargs="+", type=Path, metavar="RUNS", help="directories of runs or sweeps, JSON files")
    add("-o", "--output", type=Path, help="HTML page to write (default: report.html, if no other output is named)")
    add("--export", type=Path, help="JSON file to write, from which the same page can be made")
    add("--tables", type=Path, help="directory for each table as .tex and .csv")
    add("--figures", type=Path, help="directory for each figure as .pdf, and as .svg for light and dark pages")
    add("--title", default="", help="heading of the page")
    args = parser.parse_args(argv)
    if args.output is None and not (args.export or args.tables or args.figures):
        args.output = Path("report.html")
    files = {"--output": args.output, "--export": args.export}
    files |= {flag: path and path / "file" for flag, path in (("--tables", args.tables), ("--figures", args.figures))}
    for flag, path in files.items():
        if path is not None:
            check_writable(flag, path)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    require_matplotlib()
    from samon.report.draw import write_figures
    from samon.report.page import render

    with log_handler(logging.StreamHandler()):
        content = read_sources(args.sources)
    if args.export:
        export(content, args.export)
    if args.tables:
        for table in tables(content):
            write_text(args.tables / f"{table.name}.csv", table.csv())
            write_text(args.tables / f"{table.name}.tex", table.latex())
    if args.figures:
        write_figures(content, args.figures)
    if args.output:
        title = args.title or "Results: " + ", ".join(path.resolve().name for path in args.sources)
        command = f"{program()} {shlex.join(sys.argv[1:] if argv is None else argv)}"
        write_text(args.output, render(content, title, command))
    print("\n".join(str(path) for path in (args.output, args.export, args.tables, args.figures) if path))
