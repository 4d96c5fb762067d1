"""What outlives a pass is copied out of the memory of captured graphs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import samon
from tests.graph_memory import Pool
from tests.nets import ShallowNet, batch
from tests.steps import assert_same, loss_of, make


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    memory = Pool()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", memory.begin)
    yield memory
    torch._dynamo.reset()


def one_call(opt, loss, x: Tensor, y: Tensor) -> Tensor:
    return samon.two_pass(opt, lambda: loss(x, y))


def grouped(opt, loss, x: Tensor, y: Tensor) -> Tensor:
    return samon.two_pass(opt, lambda: loss(x, y), groups=2, bn_stats="both")


def accumulated(opt, loss, x: Tensor, y: Tensor) -> Tensor:
    parts = zip(x.chunk(2), y.chunk(2), strict=True)
    losses = [samon.two_pass(opt, lambda a=a, b=b: loss(a, b), loss_scale=0.5) for a, b in parts]
    return torch.stack(losses).mean()


def shared(opt, loss, x: Tensor, y: Tensor) -> Tensor:
    parts = zip(x.chunk(2), y.chunk(2), strict=True)
    return samon.two_pass(opt, [lambda a=a, b=b: loss(a, b) for a, b in parts])


RUNS = {one_call: 2, grouped: 2, accumulated: 4, shared: 4}


@pytest.mark.parametrize("update", RUNS, ids=lambda f: f.__name__)
def test_nothing_is_read_from_memory_of_an_earlier_run(pool: Pool, update: Callable) -> None:
    """Three updates on captured graphs equal three eager ones."""
    (model, opt), (twin, eager) = (make(ShallowNet, "samon-fisher") for _ in range(2))
    plain = lambda x, y: loss_of(twin, x, y)()  # noqa: E731
    fast = torch.compile(lambda x, y: loss_of(model, x, y)(), backend=pool.backend)
    opt.compile("aot_eager", "reduce-overhead")
    x, y = batch()
    for _ in range(3):
        losses = []
        for o, f in ((opt, fast), (eager, plain)):
            o.zero_grad()
            losses.append(update(o, f, x, y))
            if f is fast:
                pool.begin()
            o.step()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-10)
    assert pool.tensors
    assert pool.runs == 3 * (RUNS[update] + 1)
    assert_same(model, twin, 1e-9)
