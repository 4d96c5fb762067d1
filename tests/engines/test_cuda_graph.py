"""What outlives a pass is copied out of the memory of captured graphs."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor

import samon
from tests.graph_memory import Pool
from tests.nets import BatchNormNet, batch, randomized


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch):
    torch._dynamo.reset()
    made = Pool()
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", made.begin)
    yield made
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


def both(pool: Pool, update: Callable, mode: str | None) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A model after three updates on captured graphs, and one after three eager ones."""
    torch.manual_seed(0)
    model = randomized(BatchNormNet())
    twin = copy.deepcopy(model)
    plain = lambda x, y: F.cross_entropy(twin(x), y)  # noqa: E731
    fast = torch.compile(lambda x, y: F.cross_entropy(model(x), y), backend=pool.backend)
    opt, eager = (create_optimizer_v2(m, "samon-fisher", lr=0.1, rho=0.3) for m in (model, twin))
    opt.compile("aot_eager", mode)
    x, y = batch()
    for _ in range(3):
        for o, m in ((opt, fast), (eager, plain)):
            o.zero_grad()
            loss = update(o, m, x, y)
            if m is fast and mode:
                pool.begin()
                first = loss
            o.step()
        if mode:
            assert first.item() == pytest.approx(loss.item(), rel=1e-10)
    return model, twin


@pytest.mark.parametrize("update", RUNS, ids=lambda f: f.__name__)
def test_nothing_is_read_from_memory_of_an_earlier_run(pool: Pool, update: Callable) -> None:
    model, twin = both(pool, update, "reduce-overhead")
    assert pool.tensors
    assert pool.runs == 3 * (RUNS[update] + 1)
    for (name, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=name)


def test_uncopied_gradients_would_be_overwritten(pool: Pool) -> None:
    """The pool is what it claims: without the copies, micro-batches add to memory that their backward overwrites."""
    model, twin = both(pool, accumulated, None)
    assert pool.runs == 0
    assert not all(torch.allclose(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
