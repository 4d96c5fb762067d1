"""What pip installs: one function for each command; it imports no other's program."""

from functools import partial
from importlib import import_module
from typing import NoReturn

from samon.errors import run_script


def _start(program: str) -> NoReturn:
    run_script(import_module(program).main)


train = partial(_start, "samon.train.main")
validate = partial(_start, "samon.evals.main")
shards = partial(_start, "samon.commands.make_shards")
sweep = partial(_start, "samon.commands.sweep")
report = partial(_start, "samon.commands.report")
predict = partial(_start, "samon.commands.predict")
export = partial(_start, "samon.commands.export")
plan = partial(_start, "samon.plan.main")
