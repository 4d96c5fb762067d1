"""ImageNet-C: 15 corruptions in five severities, and the mean corruption error (Hendrycks & Dietterich 2019)."""

import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from samon.evals.entry import Entry
from samon.evals.results import Row

# Corruption, as its folder is called -> AlexNet's top-1 error in %, mean of the severities, as published.
ALEXNET: dict[str, float] = json.loads(Path(__file__).with_name("alexnet_errors.json").read_text())
SEVERITIES = range(1, 6)


def parts(entry: Entry) -> list[Entry]:
    """The 75 sets of the whole, which lie in CORRUPTION/SEVERITY under its directory."""
    found = []
    for corruption, severity in itertools.product(ALEXNET, SEVERITIES):
        name, root = f"{entry.name}/{corruption}/{severity}", Path(entry.root, corruption, str(severity))
        about = {"corruption": corruption, "severity": severity, "whole": entry.name}
        found.append(replace(entry, name=name, root=str(root), about=about))
    return found


def errors(rows: Iterable[Row]) -> list[Row]:
    """From the top-1 rows of the parts: ``ce`` of each corruption and their mean ``mce``, in % of AlexNet's errors.

    CE = sum of the errors over the severities / sum of AlexNet's (equation 1 of the paper).
    """
    every = [row for row in rows if "whole" in row and (row["eval"], row["metric"]) == ("accuracy", "top1")]
    found: list[Row] = []
    for whole in dict.fromkeys(row["whole"] for row in every):
        tops = [row for row in every if row["whole"] == whole]
        values = {name: [100 - row["value"] for row in tops if row["corruption"] == name] for name in ALEXNET}
        ce = {name: 100 * sum(parts) / (len(parts) * ALEXNET[name]) for name, parts in values.items()}
        about: Row = {
            key: tops[0][key] for key in ("model", "checkpoint", "split", "eval", "preprocessing") if key in tops[0]
        }
        about |= {"dataset": whole, "num_samples": sum(row["num_samples"] for row in tops)}
        if odd := [row for row in tops if row.get("mismatch")]:
            about["mismatch"] = f"{odd[0]['dataset']}: {odd[0]['mismatch']}"
        found.append({**about, "metric": "mce", "value": sum(ce.values()) / len(ce)})
        found += [{**about, "metric": "ce", "setting": name, "value": value} for name, value in ce.items()]
    return found
