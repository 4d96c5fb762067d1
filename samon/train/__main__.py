"""`python -m samon.train`: train.py where there is no checkout."""

from samon.errors import run
from samon.train.main import main

if __name__ == "__main__":
    run(main)
