"""ImageNet-C: 15 corruptions at five severities, and the mean corruption error (Hendrycks & Dietterich 2019)."""

import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from samon.evals.results import Result

# AlexNet's top-1 error in %, mean over the severities, by corruption (the name of its folder), as published.
ALEXNET: dict[str, float] = json.loads(Path(__file__).with_name("alexnet_errors.json").read_text())
SEVERITIES = range(1, 6)


def corruption_errors(results: Iterable[Result]) -> list[Result]:
    """From the top-1 results of the 75 sets: `ce` of each corruption and their mean `mce`, in % of AlexNet's errors.

    CE = sum of the errors over the severities / sum of AlexNet's (equation 1 of the paper).
    """
    top1 = [row for row in results if "corruption" in row and (row["eval"], row["metric"]) == ("accuracy", "top1")]
    errors: list[Result] = []
    for name, group in groupby(top1, lambda row: row["dataset"].rsplit("/", 2)[0]):  # NAME/CORRUPTION/SEVERITY
        rows, ce = list(group), {}
        for corruption, alexnet in ALEXNET.items():
            values = [100 - row["value"] for row in rows if row["corruption"] == corruption]
            ce[corruption] = 100 * sum(values) / (len(values) * alexnet)
        shared = ("model", "checkpoint", "ema", "split", "eval", "preprocessing")
        metadata: Result = {key: rows[0][key] for key in shared if key in rows[0]}
        metadata |= {"dataset": name, "num_samples": sum(row["num_samples"] for row in rows)}
        if different := [row for row in rows if row.get("mismatch")]:
            metadata["mismatch"] = f"{different[0]['dataset']}: {different[0]['mismatch']}"
        errors.append({**metadata, "metric": "mce", "value": sum(ce.values()) / len(ce)})
        errors += [{**metadata, "metric": "ce", "setting": name, "value": value} for name, value in ce.items()]
    return errors
