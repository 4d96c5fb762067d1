"""What pip installs: one function for each command; it imports no other's program."""

from functools import partial
from importlib import import_module
from typing import NoReturn

from samon.cli.program import run_script


def _start(program: str) -> NoReturn:
    run_script(import_module(program).main)


train = partial(_start, "samon.trainer.main")
validate = partial(_start, "samon.evals.main")
shards = partial(_start, "samon.cli.make_shards")
sweep = partial(_start, "samon.cli.sweep")
report = partial(_start, "samon.cli.report")
predict = partial(_start, "samon.cli.predict")
export = partial(_start, "samon.cli.export")
plan = partial(_start, "samon.plan.main")
