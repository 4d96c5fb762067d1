#!/usr/bin/env python3
"""Evaluate timm models and checkpoints: accuracy, shifts, attacks, sharpness, feature rank, normalization."""

import sys

from samon.cli import run
from samon.evals.validate import main

if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
