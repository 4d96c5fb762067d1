"""The optimizer's part of a training state: which optimizer it belongs to, and how it is put back."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from samon.errors import UserError
from samon.registry import base_of
from samon.trainer import fsdp as sharding
from samon.trainer.build import Run
from samon.trainer.checkpoint import settings_of

ANEW = "use what it was made with, or --no-resume-opt to start the optimizer's state anew"
COUNTED = {"params", "lr", "step", "lookahead_step"}  # of a parameter group, what training itself changes


def layout(run: Run) -> dict[str, Any]:
    """What a state fits: `base`, timm's name of the optimizer that applies the gradient, and `groups`, the names of
    each group's parameters."""
    names = {id(p): name for name, p in run.model.named_parameters()}
    groups = [[names[id(p)] for p in group["params"]] for group in run.optimizer.param_groups]
    return {"base": base_of(run.config.opt, run.config.base_opt), "groups": groups}


def load_optimizer(run: Run, source: Path, content: Mapping[str, Any], changed: Collection[str]) -> None:
    """Put the optimizer's state back. Options of its groups (weight decay, betas, lr_scale) are those asked for now.

    Args:
        content: of the checkpoint `source`; one of timm's, or of an earlier version, does not name its parameters.
        changed: the settings that are not those of the checkpoint.

    Raises:
        UserError: it is the state of another optimizer, or of other groups of parameters.
    """
    state, was, now = content["optimizer"], content.get("optimizer_layout", {}), layout(run)
    args = settings_of(content)
    base = was.get("base") or (base_of(args["opt"], args.get("base_opt")) if args.get("opt") else now["base"])
    if base != now["base"]:
        raise UserError(f"{source} has the optimizer state of {base}, and {now['base']} is asked for; {ANEW}")
    before, groups = state["param_groups"], run.optimizer.param_groups
    sizes = [[len(group["params"]) for group in one] for one in (before, groups)]
    if was.get("groups", now["groups"]) != now["groups"] or sizes[0] != sizes[1]:
        raise UserError(
            f"{source} has an optimizer state of other groups of parameters{_first_change(was, now)}, as --freeze, "
            f"--layer-decay or the weight decay make them; {ANEW}"
        )
    loaded = COUNTED - {"lr"} if "lr" in changed else COUNTED
    asked = [{key: value for key, value in group.items() if key not in loaded} for group in groups]
    state = {**state, "param_groups": [old | new for old, new in zip(before, asked, strict=True)]}
    run.optimizer.load_state_dict(sharding.given_to(state, run.optimizer) if run.config.fsdp else state)


def _first_change(*layouts: Mapping[str, Any]) -> str:
    then, now = ({n: i for i, group in enumerate(one.get("groups", [])) for n in group} for one in layouts)
    other = [name for name in now | then if then.get(name) != now.get(name)]
    return f" ({other[0]} and {len(other) - 1} others changed theirs)" if then and other else ""
