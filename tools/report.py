#!/usr/bin/env python3
"""One page of figures and tables from runs and sweeps: `python tools/report.py --help`."""

from samon.cli.program import run_script
from samon.cli.report import main

if __name__ == "__main__":
    run_script(main)
