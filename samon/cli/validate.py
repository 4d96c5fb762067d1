"""`python -m samon.cli.validate`, `torchrun -m samon.cli.validate`: validate.py where there is no checkout."""

from samon.cli.program import run_script
from samon.evals.main import main

if __name__ == "__main__":
    run_script(main)
