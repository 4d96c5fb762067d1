"""Training loops of other libraries: their steps equal those of a plain loop with `samon.two_pass`.

Tolerance 1e-9 relative: float64 sums in another order."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samon
from samon import UserError
from tests import steps
from tests.nets import batch
from tests.steps import closure_of, loss_of, make, update

lightning = pytest.importorskip("lightning")
accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainers: few workers, short epochs
BATCHES = [batch(seed=step) for step in range(6)]
ASCENTS = ("batch", "fsam", "looksam:2", "previous")


def own_loop(accumulate: int = 1, logits: torch.dtype = torch.float64, **how: Any) -> nn.Module:
    model, opt = make(**how)
    losses = [lambda x=x, y=y: F.cross_entropy(model(x).to(logits), y) for x, y in BATCHES]
    for i in range(0, len(losses), accumulate):
        update(opt, *losses[i : i + accumulate])
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    steps.assert_same(model, expected, 1e-9)


class Module(lightning.LightningModule):
    """Automatic optimization; manual with `accumulate` micro-batches per update otherwise."""

    def __init__(self, accumulate: int = 0, **how: Any) -> None:
        super().__init__()
        self.model, self.opt = make(**({"rho": 9.0} if accumulate else {}), **how)
        self.automatic_optimization, self.accumulate = not accumulate, accumulate

    def configure_optimizers(self) -> Any:
        return self.opt

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def training_step(self, pair: Any, index: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(*pair)
        opt: Any = self.optimizers()
        if index % self.accumulate == 0:
            opt.zero_grad()
        opt.rho = steps.RHO  # reaches the optimizer inside the wrapper
        samon.two_pass(opt, partial(self.loss, *pair), loss_scale=1 / self.accumulate)
        before = dict(opt.stats)
        if (index + 1) % self.accumulate == 0:
            opt.step()
            assert opt.stats == before
            assert before
        return None


def fit(module: Module, **how: Any) -> nn.Module:
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **how,
    )
    trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None))
    return module.model


@pytest.mark.parametrize("ascent", ASCENTS)
def test_lightnings_automatic_optimization(ascent: str) -> None:
    assert_same(fit(Module(ascent=ascent)), own_loop(ascent=ascent))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ascent", ASCENTS)
def test_lightnings_manual_optimization(ascent: str, accumulate: int) -> None:
    """Its `step` passes a closure that does nothing."""
    assert_same(fit(Module(accumulate, ascent=ascent)), own_loop(accumulate, ascent=ascent))


def test_lightnings_accumulation_is_refused() -> None:
    """Its closure runs the earlier micro-batches at w and does not clear what they left."""
    with pytest.raises(UserError, match=r"accumulate_grad_batches.*manually: samon\.two_pass"):
        fit(Module(), accumulate_grad_batches=2)


class PlainSteps(Module):
    def __init__(self, on_purpose: bool) -> None:
        super().__init__(accumulate=1)
        self.on_purpose = on_purpose

    def training_step(self, pair: Any, index: int) -> None:
        opt: Any = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(*pair))
        if self.on_purpose:
            opt.expect_plain_step()
        opt.step()


def test_lightnings_manual_backward_alone_is_refused_unless_announced() -> None:
    with pytest.raises(UserError, match="earlier gradients were not cleared"):
        fit(PlainSteps(False))
    twin, opt = make()
    for x, y in BATCHES:
        opt.zero_grad()
        loss_of(twin, x, y)().backward()
        opt.base.step()
    assert_same(fit(PlainSteps(True)), twin)


def run_wrapped(way: str, model: nn.Module, opt: Any, backward: Callable[[Tensor], None]) -> None:
    """The loop of a library whose wrappers are around model and optimizer."""
    for x, y in BATCHES:
        if way == "two_pass":
            update(opt, loss_of(model, x, y))
        else:
            opt.step(closure_of(opt, loss_of(model, x, y), backward))


@pytest.mark.parametrize("way", ["two_pass", "closure"])
def test_accelerate(way: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt = accelerator.prepare(*make())
    run_wrapped(way, model, opt, accelerator.backward)
    assert_same(accelerator.unwrap_model(model), own_loop())


def test_accelerates_accumulation() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, opt = accelerator.prepare(*make(ascent="fsam"))
    for x, y in BATCHES:
        with accelerator.accumulate(model):
            samon.two_pass(opt, lambda x=x, y=y: F.cross_entropy(model(x), y), loss_scale=0.5)
            opt.step()
            opt.zero_grad()
    assert_same(accelerator.unwrap_model(model), own_loop(2, ascent="fsam"))


def test_accelerates_gradient_scaler_is_used() -> None:
    """Its optimizer divides the gradients by the scale, whether or not the loss was multiplied by it."""
    accelerate.Accelerator(cpu=True)
    (model, own), (twin, opt) = make(), make()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(own, device_placement=False, scaler=scaler)
    update(wrapped, loss_of(model, *batch()))
    update(opt, loss_of(twin, *batch()))
    assert_same(model, twin)


@pytest.mark.parametrize("way", ["two_pass", "closure"])
def test_fabric(way: str) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="64-true")
    model, opt = fabric.setup(*make())
    run_wrapped(way, model, opt, fabric.backward)
    assert samon.sam_of(opt).stats
    assert_same(model.module, own_loop(logits=torch.float32))  # what Fabric's modules return
    refused = pytest.raises(UserError, match="would lose its update")
    with opt.perturbed([torch.ones_like(p) for p in opt.perturbed_parameters().values()]), refused:
        opt.step()
    fabric.backward(loss_of(model, *BATCHES[0])())
    opt.first_step(zero_grad=True)
    with pytest.raises(UserError, match=r"call second_step\(\) before"):
        update(opt, loss_of(model, *BATCHES[0]))
    fabric.backward(loss_of(model, *BATCHES[0])())
    opt.second_step(zero_grad=True)
    opt.replace_base("adamw")
    torch.optim.lr_scheduler.LinearLR(opt)  # replaces `step`
    update(opt, loss_of(model, *BATCHES[0]))
    assert isinstance(samon.sam_of(opt).base, torch.optim.AdamW)
    assert samon.sam_of(opt).state
