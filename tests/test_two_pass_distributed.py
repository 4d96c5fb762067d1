"""m-sharpness over two real gloo processes against the sequential reference; traffic counted. Tolerance 1e-10."""

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import samon
from tests import reference
from tests.nets import LATE, NETS, batch
from tests.processes import run_ranks
from tests.steps import RHO, closure_of, error_of, gradients, loss_of, losses_of, optimizer_of, values
from tests.steps import make as make_both

SIZE = 8
Ranks = list[dict[str, dict]]
CASES: dict[str, dict[str, Any]] = {
    "device": {},
    "global": {"reduce": "global"},
    "replay": {"perturb": "late", "steps": 3},
    "groups": {"groups": 2},
    "accumulate device": {"accumulate": True},
    "accumulate global": {"reduce": "global", "accumulate": True},
    "raw": {"radius": "raw"},
    "loss global": {"radius": "loss", "reduce": "global"},
    "mix groups": {"radius": 0.5, "groups": 2},
    "frozen": {"perturb_frozen": True},
    "frozen global": {"perturb_frozen": True, "reduce": "global"},
    "frozen groups": {"perturb_frozen": True, "groups": 2},
}


def make(net: str = "layernorm") -> nn.Module:
    return make_both(NETS[net])[0]


def half(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (t.chunk(2)[rank] for t in batch(SIZE))
    return x, y


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
    for net, (case, options) in itertools.product(NETS, CASES.items()):
        model = make(net)
        if "perturb_frozen" in options:
            model.requires_grad_(False).head.requires_grad_(True)
        ddp = DistributedDataParallel(model, broadcast_buffers="perturb" in options)
        traffic = Traffic(ddp)
        how = {k: v for k, v in options.items() if k in ("radius", "perturb_frozen")}
        opt = optimizer_of(model, "samon-layerl2", perturb=LATE[net] if "perturb" in options else None, **how)
        keywords = {k: v for k, v in options.items() if k in ("reduce", "groups")} | {"no_sync": ddp.no_sync}
        for _ in range(options.get("steps", 1)):
            ddp.zero_grad()
            traffic.buckets = traffic.other = 0
            with traffic:
                if not options.get("accumulate"):
                    samon.two_pass(opt, loss_of(ddp, *half(rank)), **keywords)
                elif "reduce" in keywords:
                    samon.two_pass(opt, losses_of(ddp, *half(rank), 2), **keywords)
                else:
                    for i, forward in enumerate(losses_of(ddp, *half(rank), 2)):
                        with ddp.no_sync() if i == 0 else nullcontext():
                            samon.two_pass(opt, forward, loss_scale=0.5, **keywords)
        results[f"{net} {case}"] = {
            "grads": gradients(model),
            "buckets": traffic.buckets,
            "other": traffic.other,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "perturbed": sum(p.numel() for p in opt.perturbed_parameters().values()),
        }
    return results


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("net", NETS)
def test_ddp_equals_the_sequential_reference(net: str, case: str, ranks: Ranks) -> None:
    options = CASES[case]
    model = make(net)
    parts = 4 if "accumulate" in options or "groups" in options else 2
    losses = losses_of(model, *batch(SIZE), parts)
    opt = optimizer_of(copy.deepcopy(model), perturb=LATE[net] if "perturb" in options else None)
    gradient = reference.sam_gradient if options.get("reduce") == "global" else reference.m_sharpness_gradient
    radius = options.get("radius", "ball")
    _, expected = gradient(model, losses, list(opt.perturbed_parameters()), "layerl2", RHO, radius)
    if "perturb_frozen" in options:
        expected = {name: g for name, g in expected.items() if name.startswith("head")}
    size = torch.cat([g.flatten() for g in expected.values()]).norm()
    for rank in ranks:
        result = rank["train"][f"{net} {case}"]
        assert result["grads"].keys() == expected.keys()
        for name, g in result["grads"].items():
            assert (g - expected[name]).norm() <= 1e-10 * size, name
        # One all-reduce of the gradients, as in plain training; `global` adds the perturbed parameters' alone.
        assert result["buckets"] == result["trained"]
        assert result["other"] == (result["perturbed"] if options.get("reduce") == "global" else 0)


def overflow_rank(rank: int) -> dict:
    """A non-finite ascent gradient on one rank only."""
    model = make()
    ddp, opt = DistributedDataParallel(model), optimizer_of(model)
    before, calls, loss = values(model), [], loss_of(ddp, *half(rank))

    def forward() -> torch.Tensor:
        calls.append(1)
        return loss() * torch.inf if rank == 1 and len(calls) == 1 else loss()

    samon.two_pass(opt, forward, no_sync=ddp.no_sync)
    return {
        "all_nan": all(bool(p.grad.isnan().any()) for p in model.parameters()),
        "restored": all(torch.equal(v, before[k]) for k, v in model.state_dict().items()),
    }


def test_a_gradient_that_is_not_finite_on_one_rank_reaches_all(ranks: Ranks) -> None:
    assert [rank["overflow"] for rank in ranks] == [{"all_nan": True, "restored": True}] * 2


def closure_rank(rank: int) -> dict:
    """`step(closure)` under DDP, whatever it makes of `.grad`; and what it refuses."""
    results: dict[str, Any] = {}
    for view, static, cleared in itertools.product((False, True), repeat=3):
        model = make()
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=view, static_graph=static)
        opt = optimizer_of(model, "samon-layerl2")
        forward = loss_of(ddp, *half(rank))

        def backward(forward: Any = forward) -> None:
            forward().backward()

        start, case = values(model), f"{view} {static} {cleared}"
        if cleared:
            for _ in range(3):  # DDP arranges its buckets anew in the second iteration
                model.load_state_dict(start)
                opt.step(closure_of(opt, forward))
            results[case] = gradients(model)
            continue
        backward()  # as a trainer that accumulates
        results[case] = "were not cleared" in error_of(opt.step, backward)
    return results | manual_passes(rank) | sharded_closure(rank)


def first_and_second_step(opt: Any, backward: Any) -> None:
    opt.zero_grad()
    backward()
    opt.first_step(zero_grad=True)
    backward()
    opt.second_step()


def manual_passes(rank: int) -> dict:
    """`first_step` under DDP, which averages both passes; and a closure with frozen parameters, which is refused."""
    model = make()
    ddp, opt = DistributedDataParallel(model), optimizer_of(model, "samon-layerl2", lr=0.0)
    forward = loss_of(ddp, *half(rank))
    first_and_second_step(opt, lambda: forward().backward())
    results: dict[str, Any] = {"first_step True": gradients(model)}
    model.requires_grad_(False).head.requires_grad_(True)
    opt = optimizer_of(model, perturb_frozen=True)
    error = error_of(opt.step, closure_of(opt, loss_of(model, *half(rank))))
    return results | {"frozen False": "does not average gradients of frozen parameters" in error}


def sharded_closure(rank: int) -> dict:
    """The same under FSDP2, which accumulates gradients on its own."""
    results: dict[str, Any] = {}
    model = fully_shard(make(), mesh=init_device_mesh("cpu", (2,)))
    opt, forward = optimizer_of(model, "samon-layerl2", lr=0.0), loss_of(model, *half(rank))

    def backward() -> None:
        forward().backward()

    for _ in range(2):
        opt.step(closure_of(opt, forward))
    results["fsdp True"] = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    first_and_second_step(opt, backward)
    results["fsdp first_step True"] = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    for case, closure in {"added": backward, "kept": lambda: None}.items():
        results[f"fsdp {case} False"] = "were not cleared" in error_of(opt.step, closure)
    gsam = optimizer_of(model, gsam_alpha=0.1)
    error = error_of(gsam.step, closure_of(gsam, forward))
    return results | {"fsdp gsam False": "gsam_alpha need full tensors" in error}


def test_a_closure_under_ddp_and_fsdp2(ranks: Ranks) -> None:
    """Both passes average over the processes, so the perturbation is that of the whole batch."""
    model = make()
    names = reference.scope_names(model, "samon")
    _, expected = reference.sam_gradient(model, [loss_of(model, *batch(SIZE))], names, "layerl2", RHO)
    for rank in ranks:
        assert len(rank["closure"]) == 15
        for case, result in rank["closure"].items():
            if case.endswith("False"):
                assert result is True, case
            else:
                for name, g in result.items():
                    torch.testing.assert_close(g, expected[name], rtol=1e-9, atol=1e-12, msg=f"{case} {name}")


def refused_rank(rank: int) -> dict[str, str]:
    results = {}
    for compiled, quiet in itertools.product((False, True), repeat=2):
        model = make()
        ddp = DistributedDataParallel(model, static_graph=True)
        loss = loss_of(torch.compile(ddp, backend="eager") if compiled else ddp, *half(rank))
        how = {"no_sync": ddp.no_sync} if quiet else {}
        results[f"static {compiled} {quiet}"] = error_of(samon.two_pass, optimizer_of(model), loss, **how)
    samon.two_pass(opt := optimizer_of(model), loss_of(model, *half(rank)))
    results["static, after steps of the bare model"] = error_of(samon.two_pass, opt, loss_of(ddp, *half(rank)))
    by_closure = lambda opt, loss: opt.step(lambda: loss().backward())  # noqa: E731
    ways = {"two_pass": samon.two_pass, "step": by_closure}
    for original, scope, way in itertools.product((False, True), ("sam", "samon"), ways):
        model, case = make(), f"{original} {scope} {way}"
        opt = optimizer_of(model, scope)  # before the model is sharded
        net = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
        loss = loss_of(net, *half(rank))
        results[f"made {case}"] = error_of(optimizer_of, net, scope)
        results[f"bare {case}"] = error_of(optimizer_of, net.parameters(), "sam")
        results[case] = error_of(ways[way], opt, loss)
    return results


def every_check(rank: int) -> dict[str, dict]:
    return {
        "train": train_rank(rank),
        "overflow": overflow_rank(rank),
        "closure": closure_rank(rank),
        "refused": refused_rank(rank),
    }


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return run_ranks(every_check, 2, timeout=240)


def test_static_graphs_and_fsdp1_are_refused(ranks: Ranks) -> None:
    for rank in ranks:
        for case, text in rank["refused"].items():
            assert ("drop static_graph" if case.startswith("static") else "fully_shard (FSDP2)") in text, case
        assert len(rank["refused"]) == 29
