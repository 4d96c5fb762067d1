"""Evaluations of a model: one file each with `rows(target, entry)`. A new evaluation is a file and a row here."""

import importlib
from types import ModuleType

EVALS = {  # name on the command line -> module
    "accuracy": "accuracy",
    "apgd": "attacks",
    "sharpness": "sharpness",
    "hessian": "hessian",
    "feature_rank": "feature_rank",
    "norm_params": "norm_params",
}


def evaluation(name: str) -> ModuleType:
    """The module of an evaluation, loaded when it is wanted."""
    return importlib.import_module(f"samon.evals.{EVALS[name]}")


def needs_data(name: str) -> bool:
    """Whether an evaluation looks at a data set, or at the weights alone."""
    return bool(getattr(evaluation(name), "NEEDS_DATA", True))
