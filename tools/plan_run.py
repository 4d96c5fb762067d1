#!/usr/bin/env python3
"""What a step will cost before any GPU is there: `python tools/plan_run.py --help`."""

from samon.cli.program import run_script
from samon.plan.main import main

if __name__ == "__main__":
    run_script(main)
