#!/usr/bin/env python3
"""Train a recipe over optimizers x rho x seeds: `python tools/sweep.py --help`."""

from samon.cli.program import run_script
from samon.cli.sweep import main

if __name__ == "__main__":
    run_script(main)
