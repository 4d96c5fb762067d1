"""m-sharpness over two real gloo processes against the sequential reference; traffic counted. Tolerance 1e-10."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import samon
from tests import reference
from tests.nets import NETS, LayerNormNet, batch, randomized
from tests.processes import run_ranks

RHO = 0.3
SIZE = 8
CASES: dict[str, dict[str, Any]] = {
    "device": {},
    "global": {"reduce": "global"},
    "replay": {"perturb": "late", "steps": 3},
    "groups": {"groups": 2},
    "accumulate device": {"accumulate": True},
    "accumulate global": {"reduce": "global", "accumulate": True},
}


def make(net: str) -> nn.Module:
    torch.manual_seed(0)
    return randomized(NETS[net]())


def perturb_of(net: str, options: dict) -> str | None:
    return {"batchnorm": r"blocks\.2", "layernorm": r"norms\.3"}[net] if "perturb" in options else None


class Traffic:
    """Numbers sent in gradient buckets and in other all-reduces."""

    def __init__(self, model: DistributedDataParallel):
        self.buckets = self.other = 0
        self.plain = dist.all_reduce

        def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            self.buckets += bucket.buffer().numel()
            work = self.plain(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        model.register_comm_hook(None, hook)

    def __enter__(self) -> "Traffic":
        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.other += tensor.numel()
            return self.plain(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self.plain


def train_rank(rank: int) -> dict:
    """Every case on this rank's half of the batch: gradients and traffic."""
    results = {}
    for net in NETS:
        for case, options in CASES.items():
            model = make(net)
            ddp = DistributedDataParallel(model, broadcast_buffers="perturb" in options)
            traffic = Traffic(ddp)
            opt = create_optimizer_v2(model, "samon-layerl2", lr=0.1, rho=RHO, perturb=perturb_of(net, options))
            x, y = (t.chunk(2)[rank] for t in batch(SIZE))
            keywords = {k: v for k, v in options.items() if k in ("reduce", "groups")}
            for _ in range(options.get("steps", 1)):
                ddp.zero_grad()
                traffic.buckets = traffic.other = 0
                with traffic:
                    if not options.get("accumulate"):
                        forward = lambda: F.cross_entropy(ddp(x), y)  # noqa: B023, E731
                        samon.two_pass(opt, forward, no_sync=ddp.no_sync, **keywords)
                        continue
                    forwards = [
                        lambda a=a, b=b: F.cross_entropy(ddp(a), b)  # noqa: B023
                        for a, b in zip(x.chunk(2), y.chunk(2), strict=True)
                    ]
                    if keywords:
                        samon.two_pass(opt, forwards, no_sync=ddp.no_sync, **keywords)
                        continue
                    for i, forward in enumerate(forwards):
                        with ddp.no_sync() if i == 0 else nullcontext():
                            samon.two_pass(opt, forward, no_sync=ddp.no_sync, loss_scale=0.5)
            results[f"{net} {case}"] = {
                "grads": {n: p.grad for n, p in model.named_parameters()},
                "buckets": traffic.buckets,
                "other": traffic.other,
                "parameters": sum(p.numel() for p in model.parameters()),
                "perturbed": sum(p.numel() for p in opt.perturbed_parameters().values()),
            }
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_ranks(train_rank, 2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("net", NETS)
def test_against_sequential_reference(net: str, case: str, ranks) -> None:
    options = CASES[case]
    model = make(net)
    x, y = batch(SIZE)
    pieces = {"device": 2, "global": 2, "replay": 2}.get(case, 4)
    losses = [
        lambda a=a, b=b: F.cross_entropy(model(a), b) for a, b in zip(x.chunk(pieces), y.chunk(pieces), strict=True)
    ]
    opt = create_optimizer_v2(copy.deepcopy(model), "samon", lr=0.1, perturb=perturb_of(net, options))
    gradient = reference.sam_gradient if options.get("reduce") == "global" else reference.m_sharpness_gradient
    _, expected = gradient(model, losses, list(opt.perturbed_parameters()), "layerl2", RHO)
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    for rank in ranks:
        result = rank[f"{net} {case}"]
        for name, g in result["grads"].items():
            assert (g - expected[name]).norm() <= 1e-10 * size, name
        # One all-reduce of the gradients, as in plain training; `global` adds the perturbed parameters' alone.
        assert result["buckets"] == result["parameters"]
        assert result["other"] == (result["perturbed"] if options.get("reduce") == "global" else 0)


def overflow_rank(rank: int) -> dict:
    """A non-finite ascent gradient on one rank only."""
    model = make("layernorm")
    ddp = DistributedDataParallel(model)
    opt = create_optimizer_v2(model, "samon", lr=0.1, rho=RHO)
    x, y = (t.chunk(2)[rank] for t in batch(SIZE))
    before = copy.deepcopy(model.state_dict())
    calls = []

    def forward() -> torch.Tensor:
        calls.append(1)
        loss = F.cross_entropy(ddp(x), y)
        return loss * torch.inf if rank == 1 and len(calls) == 1 else loss

    samon.two_pass(opt, forward, no_sync=ddp.no_sync)
    return {
        "all_nan": all(bool(p.grad.isnan().any()) for p in model.parameters()),
        "restored": all(torch.equal(v, before[k]) for k, v in model.state_dict().items()),
    }


def test_non_finite_gradient_on_one_rank_reaches_all() -> None:
    assert run_ranks(overflow_rank, 2) == [{"all_nan": True, "restored": True}] * 2


def test_global_without_processes_is_local() -> None:
    model = randomized(LayerNormNet())
    twin = copy.deepcopy(model)
    x, y = batch()
    for m, reduce in ((model, "global"), (twin, "device")):
        opt = create_optimizer_v2(m, "samon", lr=0.1, rho=RHO)
        samon.two_pass(opt, lambda m=m: F.cross_entropy(m(x), y), reduce=reduce)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
