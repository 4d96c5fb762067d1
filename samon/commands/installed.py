"""What pip installs: one function for each command."""

from typing import NoReturn

from samon.errors import run


def train() -> NoReturn:
    from samon.train.main import main

    run(main)


def validate() -> NoReturn:
    from samon.evals.main import main

    run(main)


def shards() -> NoReturn:
    from samon.commands.make_shards import main

    run(main)


def sweep() -> NoReturn:
    from samon.commands.sweep import main

    run(main)


def report() -> NoReturn:
    from samon.commands.report import main

    run(main)


def predict() -> NoReturn:
    from samon.commands.predict import main

    run(main)


def export() -> NoReturn:
    from samon.commands.export import main

    run(main)


def plan() -> NoReturn:
    from samon.plan.main import main

    run(main)
