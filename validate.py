#!/usr/bin/env python3
"""Evaluate timm models and checkpoints: accuracy, shifts, attacks, sharpness, feature rank, normalization."""

from samon.cli.program import run_script
from samon.cli.validate import main

if __name__ == "__main__":
    run_script(main)
