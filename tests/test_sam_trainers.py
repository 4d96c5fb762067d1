"""Other people's loops, with the real libraries: their steps are those of a loop of one's own with `samon.two_pass`.

Tolerance 1e-9 relative: float64 sums in another order."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import samon
from samon import UserError
from tests.nets import LayerNormNet, batch, randomized

lightning = pytest.importorskip("lightning")
accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers' own: few workers, short epochs
BATCHES = [batch(seed=step) for step in range(6)]
ASCENTS = ("batch", "friendly", "every:2", "previous")


def make(**how: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = randomized(LayerNormNet())
    return model, create_optimizer_v2(model, "samon", lr=0.1, weight_decay=0.0, rho=0.3, **how)


def own_loop(accumulate: int = 1, logits: torch.dtype = torch.float64, **how: Any) -> nn.Module:
    model, opt = make(**how)
    for i, (x, y) in enumerate(BATCHES):
        if i % accumulate == 0:
            opt.zero_grad()
        samon.two_pass(opt, lambda x=x, y=y: F.cross_entropy(model(x).to(logits), y), loss_scale=1 / accumulate)
        if (i + 1) % accumulate == 0:
            opt.step()
    return model


def assert_same(model: nn.Module, expected: nn.Module) -> None:
    parameters = dict(expected.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, parameters[name], rtol=1e-9, atol=1e-12, msg=name)


class Module(lightning.LightningModule):
    """Automatic optimization; manual with K micro-batches an update where `accumulate` says so."""

    def __init__(self, accumulate: int = 0, **how: Any) -> None:
        super().__init__()
        self.model, self.opt = make(**how)
        self.automatic_optimization, self.accumulate = not accumulate, accumulate
        self.seen: list[dict[str, Tensor]] = []

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


def test_lightnings_manual_backward_alone_is_refused() -> None:
    class Plain(Module):
        def training_step(self, pair: Any, index: int) -> None:
            opt: Any = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.loss(*pair))
            opt.step()

    with pytest.raises(UserError, match="earlier gradients were not cleared"):
        fit(Plain(1))


def test_lightnings_manual_plain_step_on_purpose() -> None:
    class Plain(Module):
        def training_step(self, pair: Any, index: int) -> None:
            opt: Any = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.loss(*pair))
            opt.expect_plain_step()
            opt.step()

    twin, opt = make()
    for x, y in BATCHES:
        opt.zero_grad()
        F.cross_entropy(twin(x), y).backward()
        opt.base.step()
    assert_same(fit(Plain(1)), twin)


def closure_of(opt: Any, backward: Callable[[Tensor], None], loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        value = loss()
        backward(value)
        return value

    return closure


@pytest.mark.parametrize("way", ["two_pass", "closure"])
def test_accelerate(way: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt = accelerator.prepare(*make())
    for x, y in BATCHES:
        loss = lambda x=x, y=y: F.cross_entropy(model(x), y)  # noqa: E731
        if way == "closure":
            opt.step(closure_of(opt, accelerator.backward, loss))
            continue
        opt.zero_grad()
        samon.two_pass(opt, loss)
        opt.step()
    assert_same(accelerator.unwrap_model(model), own_loop())


def test_accelerates_accumulation() -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, opt = accelerator.prepare(*make(ascent="friendly"))
    for x, y in BATCHES:
        with accelerator.accumulate(model):
            samon.two_pass(opt, lambda x=x, y=y: F.cross_entropy(model(x), y), loss_scale=0.5)
            opt.step()
            opt.zero_grad()
    assert_same(accelerator.unwrap_model(model), own_loop(2, ascent="friendly"))


@pytest.mark.parametrize("way", ["two_pass", "closure"])
def test_fabric(way: str) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="64-true")
    model, opt = fabric.setup(*make())
    for x, y in BATCHES:
        loss = lambda x=x, y=y: F.cross_entropy(model(x), y)  # noqa: E731
        if way == "closure":
            opt.step(closure_of(opt, fabric.backward, loss))
            continue
        opt.zero_grad()
        samon.two_pass(opt, loss)
        opt.step()
    assert samon.sam_of(opt).stats
    assert_same(model.module, own_loop(logits=torch.float32))  # what Fabric's modules return


def test_timms_closure() -> None:
    """As in timm's own optimizer tests: `optimizer.step(closure)` with the standard closure."""
    model, opt = make()
    for x, y in BATCHES:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        opt.step(closure)
    assert_same(model, own_loop())


@pytest.mark.parametrize("first_backward", [True, False])
def test_davda54s_closure(first_backward: bool) -> None:
    """There the caller makes the first pass and the closure, which clears nothing, the second; without the caller's
    pass and with cleared gradients it is right here as well."""
    model, opt = make()
    for x, y in BATCHES:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        if first_backward:
            F.cross_entropy(model(x), y).backward()
            with pytest.raises(UserError, match="no backward before step"):
                opt.step(closure)
            return
        opt.step(closure)
        opt.zero_grad()
    assert_same(model, own_loop())
