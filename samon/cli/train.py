"""`python -m samon.cli.train`: train.py where there is no checkout."""

from samon.cli.program import run_script
from samon.trainer.main import main

if __name__ == "__main__":
    run_script(main)
