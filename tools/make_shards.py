#!/usr/bin/env python3
"""Pack images into WebDataset shards: `python tools/make_shards.py --help`."""

from samon.cli.make_shards import main
from samon.cli.program import run_script

if __name__ == "__main__":
    run_script(main)
