"""Entry points of the installed commands; each imports only its own program."""

from functools import partial
from importlib import import_module
from typing import NoReturn

from samon.cli.program import run_script


def _run(module: str) -> NoReturn:
    run_script(import_module(module).main)


train = partial(_run, "samon.trainer.main")
validate = partial(_run, "samon.cli.validate")
shards = partial(_run, "samon.cli.make_shards")
sweep = partial(_run, "samon.cli.sweep")
report = partial(_run, "samon.cli.report")
predict = partial(_run, "samon.cli.predict")
export = partial(_run, "samon.cli.export")
plan = partial(_run, "samon.plan.main")
