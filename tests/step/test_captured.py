"""CUDA graphs without a GPU: a backend whose graphs write their outputs into the same memory at every run, and which
spoils all of that memory when a new run is announced, as a replay does."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import samon
from tests.nets import BatchNormNet, batch, randomized


class Pool:
    """The memory that all graphs share."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.runs = 0

    def begin(self) -> None:
        self.runs += 1
        for tensor in self.tensors:
            tensor.fill_(torch.nan)

    def captured(self, graph, inputs) -> Callable:
        own: dict[int, Tensor] = {}

        def run(*args: Tensor) -> list[Tensor | None]:
            given = {a.data_ptr() for a in args if isinstance(a, Tensor)}
            results: list[Tensor | None] = []
            for i, result in enumerate(graph(*args)):
                if isinstance(result, Tensor) and result.is_floating_point() and result.data_ptr() not in given:
                    if i not in own:
                        own[i] = torch.empty_like(result)
                        self.tensors.append(own[i])
                    result = own[i].copy_(result).detach()
                results.append(result)
            return results

        return make_boxed_func(run)


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
    backend = aot_autograd(fw_compiler=pool.captured, bw_compiler=pool.captured)
    plain = lambda x, y: F.cross_entropy(twin(x), y)  # noqa: E731
    fast = torch.compile(lambda x, y: F.cross_entropy(model(x), y), backend=backend)
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
