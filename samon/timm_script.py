"""`python -m samon.timm_script SCRIPT.py ARGS...` runs a timm-style training script unchanged, with SAM inside.

The script makes its optimizer with timm's factory (`--opt samon-layerl2`, `--opt-kwargs rho=0.05`) and gets its loss
from one of timm's training tasks. Here the task's call makes the ascent pass first and returns the loss at w + eps;
the weights are back at w when that loss's backward pass returns, before the script clips, steps, averages or saves.
"""

import runpy
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.task.task import TrainingTask
from torch import Tensor

from samon.cli.program import run_script
from samon.errors import UserError
from samon.sam import SAM
from samon.two_pass import WholeBatch

_sams: list[weakref.ref] = []  # in the order they were made
_scalers: list[weakref.ref] = []
_plain_call = TrainingTask.__call__


class Perturbed:
    """The two passes of one task, and what has to be undone between them and the next use of the weights."""

    def __init__(self, task: TrainingTask, sam: SAM) -> None:
        self.sam, self.undo, self.inside = sam, ExitStack(), False
        self.restore = self.undo.close  # back to w, bit by bit
        module: Any = task.get_trainable_module()
        self.no_sync = getattr(module, "no_sync", nullcontext)
        # A loss that is never differentiated would leave w + eps: nobody gets to see it.
        module.register_forward_pre_hook(lambda *_: None if self.inside else self.restore())
        module.register_state_dict_pre_hook(lambda *_: self.restore())
        sam.register_step_pre_hook(lambda *_: self.restore())

    def losses(self, plain: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The task's result at w + eps, from its `plain` call."""
        self.restore()
        sam, scaler, ascends = self.sam, _latest(_scalers), self.sam.ascent.needs_ascent_pass()
        named = self.undo.enter_context(sam.sampled_parameters())  # zero_grad() before backward() belongs to the step
        engine = WholeBatch(sam, named, "first" if ascends else "second")
        engine.no_sync, engine.scaler = self.no_sync, scaler
        clean = grads = None
        self.inside = True
        try:
            if ascends:
                clean, grads = engine.ascent_gradient([lambda: plain()["loss"]])
                if sam.ascent.needs_clean_grad:
                    sam.ascent.accumulate_clean_grad(grads, 1.0)
            eps, finite = sam.ascend(named, grads)
            if eps is not None:
                self.undo.enter_context(engine.perturbed(eps))
            result = plain()
        except BaseException:
            self.restore()
            raise
        finally:
            self.inside = False
        loss = result["loss"]
        last = loss.detach()
        sam.stats |= {"loss": last} if clean is None else {"loss": clean, "loss_perturbed": last}
        if scaler is not None and finite is not None:  # else eps is zero: the gradient at w
            loss = loss * torch.where(finite, 1.0, torch.nan)
        loss.register_hook(lambda _: torch.autograd.Variable._execution_engine.queue_callback(self.restore))
        return {**result, "loss": loss}


def _call(task: TrainingTask, *args: Any, **kwargs: Any) -> Any:
    def plain() -> Any:
        return _plain_call(task, *args, **kwargs)

    if not (task.training and torch.is_grad_enabled()):
        return plain()
    if "_samon" not in task.__dict__:  # the newest of our optimizers over its parameters; None if it has another one
        own = {id(p) for p in task.parameters()}
        sam = _latest(_sams, lambda sam: any(id(p) in own for p in sam.selection.parameters.values()))
        task.__dict__["_samon"] = None if sam is None else Perturbed(task, sam)
    perturbed = task.__dict__["_samon"]
    return plain() if perturbed is None else perturbed.losses(plain)


def _latest(references: list[weakref.ref], wanted: Callable[[Any], bool] = lambda made: True) -> Any:
    return next((made for r in reversed(references) if (made := r()) is not None and wanted(made)), None)


def _refuse_plain_step(sam: Any, args: Any, kwargs: Any) -> None:
    """A step without closure, task or `two_pass` before it would silently be a plain one."""
    if not sam.stats and not args[1:] and not kwargs.get("closure"):
        raise UserError(
            "this script does not take its loss from a timm.task training task, so nothing perturbs the weights; "
            "use optimizer.step(closure) or samon.two_pass in it, or train.py of this project"
        )


def install() -> None:
    """Let timm's tasks know of our optimizers and of the gradient scaler, from now on in this process."""
    _remember(SAM, _sams, lambda sam: sam.register_step_pre_hook(_refuse_plain_step))
    _remember(torch.amp.GradScaler, _scalers)
    TrainingTask.__call__ = _call  # type: ignore[method-assign]


def _remember(kind: Any, references: list[weakref.ref], then: Callable[[Any], Any] = lambda made: None) -> None:
    initialize = kind.__init__

    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        then(self)
        references.append(weakref.ref(self))

    kind.__init__ = remembering


def main(argv: list[str] | None = None) -> None:
    """Run the script as if it had been started itself."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if not arguments or not Path(arguments[0]).is_file():
        what = f"no script {arguments[0]}" if arguments else "no script named"
        raise UserError(f"{what}; usage: python -m samon.timm_script SCRIPT.py ARGS...")
    install()
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    run_script(main)
