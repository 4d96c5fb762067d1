"""Evaluations of a model. An evaluation is a module of this package and a row of `EVALS`.

The module defines `evaluate(context, dataset) -> list[Result]`, one result per figure with the keys `metric`, `value`,
`num_samples` and, if several rows share a metric, `setting`. It may define `check(context, dataset)`, which raises
UserError if the settings do not fit, before any work.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Evaluation:
    """How `samon.cli.validate` runs an evaluation.

    Attributes:
        split: key of the setting that names the split to read; empty: the data set's own split.
        batch_size: key of the setting with the images per batch, which an out-of-memory error names.
        column: heading of its figures in the table; empty: the metric's name.
        needs_data: whether it reads a data set; otherwise `dataset` is None.
        single_label: whether its loss is defined for one label per image: `context.model` has the set's classes alone.
    """

    split: str = ""
    batch_size: str = "batch_size"
    column: str = ""
    needs_data: bool = True
    single_label: bool = False


EVALS = {  # by module name, which is the name on the command line
    "accuracy": Evaluation(),
    "apgd": Evaluation(batch_size="apgd_batch_size", single_label=True),
    "sharpness": Evaluation("sharpness_split", "sharpness_m", "value", single_label=True),
    "hessian": Evaluation("hessian_split", column="value", single_label=True),
    "feature_rank": Evaluation("feature_split", column="value"),
    "norm_params": Evaluation(column="value", needs_data=False),
}


def load_evaluation(name: str) -> ModuleType:
    """Import the module of an evaluation."""
    return importlib.import_module(f"samon.evals.{name}")
