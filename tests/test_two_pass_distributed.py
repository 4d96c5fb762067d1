"""m-sharpness over two real gloo processes against the sequential reference; traffic counted. Tolerance 1e-10."""

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import samon
from samon import UserError
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


def closure_rank(rank: int) -> dict:
    """`step(closure)` under DDP, whatever it makes of `.grad`; and what it refuses."""
    found: dict[str, Any] = {}
    for view, static, cleared in itertools.product((False, True), repeat=3):
        model = make("layernorm")
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=view, static_graph=static)
        opt = create_optimizer_v2(model, "samon-layerl2", lr=0.1, rho=RHO)
        x, y = (t.chunk(2)[rank] for t in batch(SIZE))

        def backward() -> None:
            F.cross_entropy(ddp(x), y).backward()  # noqa: B023

        def closure() -> None:
            opt.zero_grad()  # noqa: B023
            backward()

        start, case = copy.deepcopy(model.state_dict()), f"{view} {static} {cleared}"
        if cleared:
            for _ in range(3):  # DDP arranges its buckets anew in the second iteration
                model.load_state_dict(start)
                opt.step(closure)
            found[case] = {n: p.grad.clone() for n, p in model.named_parameters()}
            continue
        backward()  # as a trainer that accumulates
        try:
            opt.step(backward)
        except UserError as error:
            found[case] = "were not cleared" in str(error)
    return found | sharded_closure(rank)


def sharded_closure(rank: int) -> dict:
    """The same under FSDP2, which accumulates gradients on its own."""
    found: dict[str, Any] = {}
    x, y = (t.chunk(2)[rank] for t in batch(SIZE))
    model = fully_shard(make("layernorm"), mesh=init_device_mesh("cpu", (2,)))
    opt = create_optimizer_v2(model, "samon-layerl2", lr=0.0, rho=RHO)

    def backward() -> None:
        F.cross_entropy(model(x), y).backward()

    for _ in range(2):
        opt.step(lambda: (opt.zero_grad(), backward()))
    found["fsdp True"] = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    for case, closure in {"added": backward, "kept": lambda: None}.items():
        try:
            opt.step(closure)
        except UserError as error:
            found[f"fsdp {case} False"] = "were not cleared" in str(error)
    gsam = create_optimizer_v2(model, "samon", lr=0.0, gsam_alpha=0.1)
    try:
        gsam.step(lambda: (gsam.zero_grad(), backward()))
    except UserError as error:
        found["fsdp gsam False"] = "gsam_alpha need full tensors" in str(error)
    return found


def closure_and_refused_rank(rank: int) -> tuple[dict, dict]:
    return closure_rank(rank), refused_rank(rank)


@pytest.fixture(scope="module")
def closures() -> list[tuple[dict, dict]]:
    return run_ranks(closure_and_refused_rank, 2)


def test_a_closure_under_ddp_and_fsdp2(closures) -> None:
    """Both passes average over the processes, so the perturbation is that of the whole batch."""
    model = make("layernorm")
    x, y = batch(SIZE)
    names = reference.scope_names(model, "samon")
    _, expected = reference.sam_gradient(model, [lambda: F.cross_entropy(model(x), y)], names, "layerl2", RHO)
    for rank, _ in closures:
        assert len(rank) == 12, rank.keys()
        for case, result in rank.items():
            if case.endswith("False"):
                assert result is True, case
            else:
                for name, g in result.items():
                    torch.testing.assert_close(g, expected[name], rtol=1e-9, atol=1e-12, msg=f"{case} {name}")


def refused_rank(rank: int) -> dict:
    found: dict[str, Any] = {}

    def attempt(case: str, act: Any) -> None:
        try:
            act()
            found[case] = "no error"
        except UserError as error:
            found[case] = str(error)

    x, y = (t.chunk(2)[rank] for t in batch(SIZE))
    for compiled, quiet in itertools.product((False, True), repeat=2):
        model = make("layernorm")
        ddp = DistributedDataParallel(model, static_graph=True)
        net = torch.compile(ddp, backend="eager") if compiled else ddp
        opt = create_optimizer_v2(model, "samon", lr=0.1, rho=RHO)
        how = {"no_sync": ddp.no_sync} if quiet else {}
        loss = lambda net=net: F.cross_entropy(net(x), y)  # noqa: E731
        attempt(f"static {compiled} {quiet}", lambda opt=opt, loss=loss, how=how: samon.two_pass(opt, loss, **how))
    samon.two_pass(opt := create_optimizer_v2(model, "samon", lr=0.1), lambda: F.cross_entropy(model(x), y))
    attempt("static, after steps of the bare model", lambda: samon.two_pass(opt, lambda: F.cross_entropy(ddp(x), y)))
    for original, scope, way in itertools.product(
        (False, True), ("sam", "samon"), ("made", "bare", "two_pass", "step")
    ):
        model = make("layernorm")
        opt = create_optimizer_v2(model, scope, lr=0.1, rho=RHO)  # before the model is sharded
        net = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        loss = lambda net=net: F.cross_entropy(net(x), y)  # noqa: E731
        acts = {
            "made": lambda net=net, scope=scope: create_optimizer_v2(net, scope, lr=0.1),
            "bare": lambda net=net: create_optimizer_v2(net.parameters(), "sam", lr=0.1),
            "two_pass": lambda opt=opt, loss=loss: samon.two_pass(opt, loss),
            "step": lambda opt=opt, loss=loss: opt.step(lambda: loss().backward()),
        }
        attempt(f"{way} {original} {scope}", acts[way])
    return found


def test_static_graphs_and_fsdp1_are_refused_by_name(closures) -> None:
    for _, rank in closures:
        for case, text in rank.items():
            assert ("drop static_graph" if case.startswith("static") else "fully_shard (FSDP2)") in text, case
        assert len(rank) == 21
