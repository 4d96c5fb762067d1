"""Starting from pretrained weights: what a weights file really gave, and parameters that are not to be trained."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from samon.errors import UserError

log = logging.getLogger("samon")


@contextmanager
def weights_checked(path: str) -> Iterator[None]:
    """While timm makes a model from the file `path`: an error if the file is not that model's.

    timm drops the classifier and then loads whatever fits, so that a file of another network, or with other names,
    leaves the model at its random start without a word."""
    load = nn.Module.load_state_dict
    found: list[tuple[set[str], int]] = []

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(self, *args, **kwargs)
        head = getattr(self, "pretrained_cfg", {}).get("classifier") or ()
        heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
        names = {name for name, _ in self.named_parameters() if not (heads and name.startswith(heads))}
        found.append((names & set(result.missing_keys), len(names)))
        return result

    nn.Module.load_state_dict = recorded  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]
    missing, total = found[-1] if found else (set(), 0)
    if total and len(missing) > total / 2:
        raise UserError(
            f"--pretrained-path {path} lacks {len(missing)} of the model's {total} parameters, such as "
            f"{min(missing)}; name a file of this model, under timm's names"
        )
    if missing:
        log.warning("--pretrained-path %s lacks %s, left at random", path, ", ".join(sorted(missing)))


def freeze(model: nn.Module, pattern: str) -> None:
    """Stop training the parameters whose qualified name the regex finds; BatchNorm statistics still move.

    Raises:
        UserError: no regex, nothing found, or nothing left to train.
    """
    try:
        found = [(name, p) for name, p in model.named_parameters() if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--freeze {pattern!r} is not a regular expression: {error}") from None
    if not found:
        names = [name for name, _ in model.named_parameters()]
        raise UserError(f"--freeze {pattern!r} matches no parameter; names go from {names[0]} to {names[-1]}")
    for _, parameter in found:
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze {pattern!r} leaves nothing to train")
    frozen, total = sum(p.numel() for _, p in found), sum(p.numel() for p in model.parameters())
    log.info("--freeze: %d tensors, %.1f %% of the parameters, stay as they are", len(found), 100 * frozen / total)
