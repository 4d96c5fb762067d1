#!/usr/bin/env python3
"""Train a timm model: `python train.py --help`, `torchrun --standalone --nproc-per-node 8 train.py ...`."""

from samon.cli.program import run_script
from samon.trainer.main import main

if __name__ == "__main__":
    run_script(main)
