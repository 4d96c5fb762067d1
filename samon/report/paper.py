"""The paper's accuracies, hparams/paper_results.yaml."""

from functools import cache

import yaml

from samon.trainer.config import RECIPES


@cache
def paper_figures(recipe: str, model: str) -> dict[str, list[float]]:
    """{optimizer name: [mean] or [mean, standard deviation], in %} of a recipe and model; empty where it has none."""
    block = yaml.safe_load((RECIPES / "paper_results.yaml").read_text()).get(recipe, {})
    if model not in block.get("models", []):
        return {}
    place = block["models"].index(model)
    return {opt: row[place] for opt, row in block.items() if opt != "models"}
