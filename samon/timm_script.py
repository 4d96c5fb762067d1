"""`python -m samon.timm_script SCRIPT.py ARGS...` runs a timm-style training script unchanged, with SAM inside.

The script creates its optimizer with timm's factory (`--opt samon-layerl2`, `--opt-kwargs rho=0.05`) and gets its loss
from one of timm's training tasks. Here the call of the task makes the ascent pass, then returns the loss at w + eps.
The weights are back at w when the backward pass of that loss returns, before the script clips, steps, averages, saves.
"""

import runpy
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from timm import utils
from timm.task.task import TrainingTask
from timm.utils import clip_grad
from torch import Tensor

from samon.ascent import Tensors
from samon.cli.program import run_script
from samon.errors import UserError
from samon.sam import SAM
from samon.two_pass import StepOptions, make_engine

Losses = dict[str, Tensor]
_sams: WeakValueDictionary[int, SAM] = WeakValueDictionary()  # in the order of their creation, as are the scalers
_scalers: WeakValueDictionary[int, torch.amp.GradScaler] = WeakValueDictionary()
_call_task = TrainingTask.__call__
CLIPPING = [(torch.nn.utils, "clip_grad_norm_"), (torch.nn.utils, "clip_grad_value_")]
CLIPPING += [(module, "adaptive_clip_grad") for module in (utils, clip_grad)]


class PerturbedTask:
    """The two passes of a task, and what must be undone before the weights are used again."""

    def __init__(self, task: TrainingTask, sam: SAM) -> None:
        self.task, self.sam, self.undo, self.in_pass = task, sam, ExitStack(), False
        self.clean: Tensors = []  # gradients at w of the last loss, until its backward pass
        self.restore = self.undo.close  # back to w, bit by bit
        module = task.get_trainable_module()
        assert module is not None
        # The loss may never be differentiated, which would leave the weights at w + eps.
        module.register_forward_pre_hook(lambda *_: None if self.in_pass else self.restore())
        module.register_state_dict_pre_hook(lambda *_: self.restore())
        sam.register_step_pre_hook(self.before_step)

    def before_step(self, *_: object) -> None:
        self.restore()
        if self.clean and not self.sam.ascent.clean:
            raise UserError(
                "this script does not differentiate the loss that its task returns, whose weight in the update the "
                "ascent source needs; use ascent='batch' without gsam_alpha"
            )
        self.clean = []

    def losses(self, call: Callable[[], Losses]) -> Losses:
        """The result of the task's `call` at w + eps."""
        self.restore()
        sam, clean, grads = self.sam, None, None
        scaler = [*_scalers.values()][-1] if _scalers else None
        self.in_pass = True
        try:
            with sam.sampled_parameters() as named:
                engine = make_engine(sam, named, StepOptions(no_sync=self.task.no_sync, scaler=scaler, replay=False))
                if engine.options.ascent_pass:
                    clean, grads = engine.ascent_gradient([lambda: call()["loss"]])
                earlier, sam.ascent.clean = sam.ascent.clean, []
                eps, finite = sam.step_perturbation(named, grads)
                self.clean, sam.ascent.clean = sam.ascent.clean, earlier
                if eps is not None:
                    self.undo.enter_context(engine.perturbed(eps))
                result = call()
        except BaseException:
            self.restore()
            raise
        finally:
            self.in_pass = False
        loss = result["loss"]
        last = loss.detach()
        sam.stats |= {"loss": last} if clean is None else {"loss": clean, "loss_perturbed": last}
        if scaler is not None and finite is not None:  # the scaler skips NaN; without one eps is zero
            loss = loss * torch.where(finite, 1.0, torch.nan)
        loss.register_hook(partial(self.in_backward, scaler))
        return {**result, "loss": loss}

    def in_backward(self, scaler: torch.amp.GradScaler | None, weight: Tensor) -> None:
        """At the start of the loss's backward pass, where its gradient is this micro-batch's scaled weight."""
        torch.autograd.Variable._execution_engine.queue_callback(self.restore)
        self.sam.ascent.used = True  # also if zero_grad() came between forward and backward
        if self.clean:
            scale = 1.0 if scaler is None else scaler.scale(torch.ones_like(weight))
            self.sam.ascent.accumulate_clean_grad(self.clean, weight / scale)
            self.clean = []


def _call(task: TrainingTask, *args: object, **kwargs: object) -> Losses:
    call = partial(_call_task, task, *args, **kwargs)
    if not (task.training and torch.is_grad_enabled()):
        return call()
    if "_samon" not in task.__dict__:  # the newest of our optimizers over the task's parameters, if any
        own = set(task.parameters())
        sams = [sam for sam in _sams.values() if own.intersection(sam.selection.parameters.values())]
        task.__dict__["_samon"] = PerturbedTask(task, sams[-1]) if sams else None
    perturbed: PerturbedTask | None = task.__dict__["_samon"]
    return call() if perturbed is None else perturbed.losses(call)


def _refuse_plain_step(sam: SAM, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
    """Refuse a step without a closure, task or `two_pass` before it, which would be a plain one in silence."""
    if not sam.stats and not args[1:] and not kwargs.get("closure"):
        raise UserError(
            "this script does not take its loss from a timm.task training task, so nothing perturbs the weights; "
            "use optimizer.step(closure) or samon.two_pass in it, or train.py of this project"
        )


def _clip(clip: Callable[..., object], parameters: Iterable[Tensor], *args: object, **kwargs: object) -> object:
    """Clip gradients that the ascent source has changed (GSAM, LookSAM)."""
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for sam in _sams.values():
        if not {*parameters}.isdisjoint(sam.selection.parameters.values()):
            sam.correct_gradients()
    return clip(parameters, *args, **kwargs)


def install() -> None:
    """Let timm's tasks find our optimizers and the gradient scaler, from now on in this process."""
    _record_instances(SAM, _sams)
    _record_instances(torch.amp.GradScaler, _scalers)
    TrainingTask.__call__ = _call  # type: ignore[method-assign]
    for module, name in CLIPPING:
        setattr(module, name, partial(_clip, getattr(module, name)))


def _record_instances(kind: Any, instances: WeakValueDictionary[int, Any]) -> None:
    initialize = kind.__init__

    def initialize_and_record(self: object, *args: object, **kwargs: object) -> None:
        initialize(self, *args, **kwargs)
        instances[max(instances, default=0) + 1] = self
        if isinstance(self, SAM):
            self.register_step_pre_hook(_refuse_plain_step)

    kind.__init__ = initialize_and_record


def main(argv: list[str] | None = None) -> None:
    """Run the script as if it had been started directly."""
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
