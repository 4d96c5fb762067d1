"""`python -m samon.timm_script SCRIPT.py ARGS...` runs a timm-style training script unchanged, with SAM inside.

The script makes its optimizer with timm's factory (`--opt samon-layerl2`, `--opt-kwargs rho=0.05`) and gets its loss
from one of timm's training tasks. Here the task's call makes the ascent pass first and returns the loss at w + eps;
the weights are back at w when that loss's backward pass returns, before the script clips, steps, averages or saves.
"""

import runpy
import sys
import weakref
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.task.task import TrainingTask
from torch import Tensor

from samon.errors import UserError, run
from samon.optim.geometry import global_norm
from samon.optim.norm_stats import kept, running_statistics
from samon.optim.sam import SAM
from samon.step.passes import frozen
from samon.step.two_pass import ascent_gradients, unperturbed

_sams: list[weakref.ref] = []  # in the order they were made
_scalers: list[weakref.ref] = []


class Perturbed:
    """The two passes of one task, and what has to be undone between them and the next use of the weights."""

    def __init__(self, task: TrainingTask, sam: SAM) -> None:
        self.sam, self.undo, self.inside = sam, ExitStack(), False
        module: Any = task.get_trainable_module()
        self.no_sync = getattr(module, "no_sync", nullcontext)
        # A loss that is never differentiated would leave w + eps: nobody gets to see it.
        module.register_forward_pre_hook(lambda *_: None if self.inside else self.restore())
        module.register_state_dict_pre_hook(lambda *_: self.restore())
        sam.register_step_pre_hook(self._before_step)

    def restore(self) -> None:
        """Back to w, bit by bit."""
        self.undo.close()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.restore()

    def losses(self, task: TrainingTask, args: Any, kwargs: Any) -> dict[str, Tensor]:
        """The task's result at w + eps."""
        self.restore()
        sam, parameters, scaler = self.sam, list(self.sam.perturbed_parameters().values()), _latest(_scalers)
        self.inside = True
        try:
            with frozen(unperturbed(sam)), self.no_sync():
                clean = _plain_call(task, *args, **kwargs)["loss"]
                grads = ascent_gradients(clean, parameters, scaler)
            eps, norm, finite = sam.perturbation(grads)
            torch.clear_autocast_cache()  # it holds half-precision copies of the weights at w
            self.undo.callback(torch.clear_autocast_cache)
            self.undo.enter_context(kept(running_statistics(sam.model) if sam.model is not None else []))
            self.undo.enter_context(sam.moved(eps))
            result = _plain_call(task, *args, **kwargs)
        except BaseException:
            self.restore()
            raise
        finally:
            self.inside = False
        loss = result["loss"]
        sam.stats = {
            "loss": clean.detach(),
            "loss_perturbed": loss.detach(),
            "eps_norm": global_norm(eps),
            "ascent_grad_norm": norm,
        }
        if scaler is not None:  # it skips the step; without one the script gets the gradient at w, for eps is zero
            loss = loss * torch.where(finite, 1.0, torch.nan)
        loss.register_hook(self._restore_after_backward)
        return {**result, "loss": loss}

    def _restore_after_backward(self, grad: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self.restore)


_plain_call = TrainingTask.__call__


def _call(task: TrainingTask, *args: Any, **kwargs: Any) -> Any:
    if not (task.training and torch.is_grad_enabled()):
        return _plain_call(task, *args, **kwargs)
    if "_samon" not in task.__dict__:
        task.__dict__["_samon"] = _attach(task)
    perturbed = task.__dict__["_samon"]
    if perturbed is None:
        return _plain_call(task, *args, **kwargs)
    return perturbed.losses(task, args, kwargs)


def _attach(task: TrainingTask) -> Perturbed | None:
    """The two passes for the newest of our optimizers over this task's parameters; None if it has another one."""
    own = {id(p) for p in task.parameters()}
    for reference in reversed(_sams):
        sam = reference()
        if sam is not None and any(id(p) in own for p in sam.selection.parameters.values()):
            return Perturbed(task, sam)
    return None


def _latest(references: list[weakref.ref]) -> Any:
    return next((made for made in (r() for r in reversed(references)) if made is not None), None)


def _refuse_plain_step(sam: Any, args: Any, kwargs: Any) -> None:
    """A step without closure, task or `two_pass` before it would silently be a plain one."""
    if not sam.stats and not args[1:] and not kwargs.get("closure"):
        raise UserError(
            "this script does not take its loss from a timm.task training task, so nothing perturbs the weights; "
            "use optimizer.step(closure) or samon.two_pass in it, or train.py of this project"
        )


def install() -> None:
    """Let timm's tasks know of our optimizers and of the gradient scaler, from now on in this process."""
    sam_init, scaler_init = SAM.__init__, torch.amp.GradScaler.__init__

    def on_sam(self: SAM, *args: Any, **kwargs: Any) -> None:
        sam_init(self, *args, **kwargs)
        self.register_step_pre_hook(_refuse_plain_step)
        _sams.append(weakref.ref(self))

    def on_scaler(self: torch.amp.GradScaler, *args: Any, **kwargs: Any) -> None:
        scaler_init(self, *args, **kwargs)
        _scalers.append(weakref.ref(self))

    SAM.__init__ = on_sam  # type: ignore[method-assign]
    torch.amp.GradScaler.__init__ = on_scaler  # type: ignore[method-assign]
    TrainingTask.__call__ = _call  # type: ignore[method-assign]


def main(argv: list[str] | None = None) -> None:
    """Run the script as if it had been started itself."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or not Path(arguments[0]).is_file():
        what = f"no script {arguments[0]}" if arguments else "no script named"
        raise UserError(f"{what}; usage: python -m samon.timm_script SCRIPT.py ARGS...")
    install()
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    run(main)
