"""Models sharded by FSDP2 against DistributedDataParallel on real gloo processes.

Tolerance 1e-12 relative, float64: reduce-scatter may add in another order than all-reduce. `samon` perturbs by each
process's own gradient (device) or by the mean (global); sharded perturbed parameters can only do the latter.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import samon
from samon.engines.fsdp import average_gradients, no_sync
from samon.geometry import GEOMETRIES
from samon.scope import norm_parameters
from tests.processes import run_ranks
from tests.steps import RHO, error_of, loss_of, losses_of, optimizer_of


class Case(NamedTuple):
    scope: str
    geometry: str
    reduce: str
    parts: int
    how: tuple[tuple[str, Any], ...] = ()  # further arguments of the optimizer


CASES = [
    Case(scope, geometry, reduce, parts)
    for scope in ("sam", "samon", "samnn")
    for geometry in GEOMETRIES
    for reduce in (("device", "global") if scope == "samon" else ("global",))
    for parts in ((1, 2) if geometry == "layerl2" else (2,))
]
CASES += [
    Case(scope, geometry, "global", 2, (("radius", radius),))
    for scope in ("sam", "samon")
    for geometry, radius in (("layerl2", "raw"), ("", "loss"), ("elemlinf", 0.5))
]
CASES += [Case("samon", "layerl2", "device", 2, (("ascent", source),)) for source in ("previous", "msam", "looksam:2")]
CASES += [Case("samon", "layerl2", "device", 1, (("replace_base", "adamw"),))]
CASES += [Case("samon", "layerl2", reduce, 2, (("perturb_frozen", True),)) for reduce in ("device", "global")]
CASES += [Case("sam", "", "global", 1, (("reshard", False),))]  # gathered weights outlive the ascent pass
# 24 rows do not divide by 5 heads and classes: shards differ in size, some are empty.
THREE = [Case("sam", "layerl2", "global", 2), Case("samon", "layerl2", "device", 1), Case("samnn", "", "global", 1)]
# 2 x 2: parameters are sharded within a row of the mesh, the same in every column; norms add up within the row.
HYBRID = [Case("sam", "layerl2", "global", 1), Case("samon", "layerl2", "device", 2), Case("sam", "", "global", 2)]


def make() -> nn.Module:
    torch.manual_seed(0)
    how: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **how).double().train()


def shard(model: nn.Module, mesh: Any, replicated: set[nn.Parameter]) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=replicated)
    return fully_shard(model, mesh=mesh, ignored_params=replicated)


def norms_of(model: nn.Module) -> set[nn.Parameter]:
    return set(norm_parameters(model).values())


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    images = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (4,), generator=generator)


def train(rank: int, mesh: Any, case: Case) -> Tensor:
    """Some updates, under FSDP2 if there is a mesh, otherwise under DDP: the full parameters and the statistics."""
    model, how = make(), dict(case.how)
    tail_opt, reshard = how.pop("replace_base", None), how.pop("reshard", True)
    if "perturb_frozen" in how:
        model.requires_grad_(False).head.requires_grad_(True)
    if mesh is None:
        net: nn.Module = DistributedDataParallel(model)
        sync = net.no_sync
    else:
        net = shard(model, mesh, norms_of(model) if case.scope == "samon" else set())
        sync = no_sync(model)
        model.set_reshard_after_backward(reshard)
    name = "-".join(filter(None, (case.scope, case.geometry, "momentum")))
    opt = optimizer_of(model, name, rho=0.05 if case.geometry == "elemlinf" else RHO, weight_decay=1e-3, **how)
    results = []
    for step in range(3 if case.how else 2):
        if step == 2 and tail_opt:
            opt.replace_base(tail_opt, 0.5)
        opt.zero_grad()
        forwards = losses_of(net, *batch(step, rank), case.parts)
        if case.reduce == "global":
            samon.two_pass(opt, forwards, reduce="global", no_sync=sync)
        else:
            for i, forward in enumerate(forwards):
                with nullcontext() if i + 1 == case.parts else sync():
                    samon.two_pass(opt, forward, no_sync=sync, loss_scale=1 / case.parts)
        if mesh is not None:
            average_gradients(model.parameters())
        opt.step()
        results += [opt.stats[key].detach().reshape(1) for key in ("eps_norm", "ascent_grad_norm") if key in opt.stats]
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([*(p.detach().flatten() for p in full), *results])


def compare(rank: int, world: int, cases: list[Case]) -> list[float]:
    """Relative distance from DDP, per case."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if world == 4 else None
    mesh = mesh or init_device_mesh("cpu", (world,))
    distances = []
    for case in cases:
        want, got = train(rank, None, case), train(rank, mesh, case)
        distances.append(((got - want).norm() / want.norm()).item())
    return distances


def losses_around_perturbed(rank: int) -> list[list[float]]:
    """Losses at w, w + eps and w by forwards without a backward pass, whose gathered root stays; without FSDP and
    with it."""
    results = []
    for sharded in (False, True):
        model = make()
        if sharded:
            shard(model, init_device_mesh("cpu", (2,)), set())
        opt, loss = optimizer_of(model, "sam"), torch.no_grad()(loss_of(model, *batch(0, 0)))
        perturbed = opt.perturbed([torch.ones_like(p) for p in opt.perturbed_parameters().values()])
        losses = [loss().item()]
        with perturbed:
            losses.append(loss().item())
        results.append([*losses, loss().item()])
    return results


class MessageCounter(TorchDispatchMode):
    """Counts collective operations. (torch's CommDebugMode fails in the second forward with torch 2.8 and 2.11.)"""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        if DTensor in types:
            return NotImplemented  # until it has become operations on tensors
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def cost(rank: int) -> list[list[float]]:
    """FLOPs and messages (gathers, scatters) of a plain step and a two-pass step."""
    mesh = init_device_mesh("cpu", (2,))
    model = make()
    shard(model, mesh, norms_of(model))
    opt, loss = optimizer_of(model), loss_of(model, *batch(0, rank))
    results = []
    for step in (lambda: loss().backward(), lambda: samon.two_pass(opt, loss)):
        step()  # lazy set-up
        opt.zero_grad()
        with FlopCounterMode(display=False) as flops, MessageCounter() as messages:
            step()
        sent = [sum(kind in name for name in messages.names) for kind in ("gather", "scatter")]
        results.append([flops.get_total_flops(), *sent])
    return results


def with_sharded_norms(rank: int) -> list[str]:
    """What a user is told whose normalization layers are sharded like everything else: the length or the error."""
    mesh, texts = init_device_mesh("cpu", (2,)), []
    for options in ({}, {"reduce": "global", "replay": True}, {"reduce": "global"}):
        model = make()
        shard(model, mesh, set())
        opt = optimizer_of(model, "samon-layerl2", perturb="blocks.1" if "replay" in options else None)
        error = error_of(samon.two_pass, opt, loss_of(model, *batch(0, rank)), **options)
        texts.append(error or f"{opt.stats['eps_norm'].item():.6f}")
    return texts


def refusals(rank: int) -> list[bool]:
    """What sharded perturbed parameters do not allow, by name."""
    mesh, results = init_device_mesh("cpu", (2,)), []
    for how, words in (
        ({"perturb_frozen": True}, "perturb_frozen needs the frozen ones replicated"),
        *(({"ascent": name}, f"ascent='{name}'") for name in ("previous", "msam", "fsam", "looksam:2", "aesam")),
        ({"gsam_alpha": 0.1}, "gsam_alpha need full tensors"),
    ):
        model = make()
        if "perturb_frozen" in how:
            model.requires_grad_(False).head.requires_grad_(True)
        shard(model, mesh, set())
        opt = optimizer_of(model, "samon", **how)
        reduce = "device" if samon.sam_of(opt).ascent.single_pass else "global"
        loss = loss_of(model, *batch(0, rank))
        results.append(words in error_of(samon.two_pass, opt, loss, reduce=reduce, replay=False))
    return results


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b, self.head = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.norm(x)).relu()))


def tensor_parallel(rank: int) -> list[float]:
    """Relative distances of the weights and lengths after a step from those of the whole batch in one process: two
    layers tensor-parallel and the norm sequence-parallel, whose gradients are partial sums, alone and with FSDP2, where
    parameters are sharded over different meshes."""
    mesh, distances = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor")), []
    torch.manual_seed(0)
    data = [(torch.randn(4, 8).double(), torch.randint(5, (4,))) for _ in range(2)]
    for fsdp in (False, True):
        for name in ("sam", "sam-layerl2", "samon-layerl2"):
            results = []
            for sharded in (False, True):
                model = Perceptron()
                forwards = [loss_of(model, x, y) for x, y in (data if fsdp else data[:1])]
                if sharded:
                    how = {"a": ColwiseParallel(input_layouts=Shard(0)), "b": RowwiseParallel()}
                    parallelize_module(model, mesh["tensor"], {**how, "norm": SequenceParallel(sequence_dim=0)})
                    x, y = data[mesh["data"].get_local_rank() if fsdp else 0]
                    forwards = [loss_of(model, distribute_tensor(x, mesh["tensor"], [Shard(0)]), y)]
                    if fsdp:
                        fully_shard(model, mesh=mesh["data"])
                opt = optimizer_of(model, name)
                samon.two_pass(opt, forwards, reduce="global")
                opt.step()
                full = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
                lengths = [opt.stats["eps_norm"].reshape(1), opt.stats["ascent_grad_norm"].reshape(1)]
                results.append(torch.cat([*(p.detach().flatten() for p in full), *lengths]))
            distances.append(((results[1] - results[0]).norm() / results[0].norm()).item())
    return distances


def every_check(rank: int) -> dict[str, Any]:
    return {
        "distances": compare(rank, 2, CASES),
        "cost": cost(rank),
        "messages": with_sharded_norms(rank),
        "refusals": refusals(rank),
        "losses": losses_around_perturbed(rank),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(every_check, 2, timeout=240)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_equal_ddp(case: Case, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["distances"][CASES.index(case)] <= 1e-12


@pytest.mark.parametrize(("world", "cases"), [(3, THREE), (4, HYBRID)], ids=["uneven shards", "hybrid"])
def test_more_processes_equal_ddp(world: int, cases: list[Case]) -> None:
    for distances in run_ranks(compare, world, world, cases, timeout=240):
        assert max(distances) <= 1e-12


def test_tensor_parallel_equals_one_process() -> None:
    for distances in run_ranks(tensor_parallel, 4, timeout=240):
        assert max(distances) <= 1e-12


def test_the_ascent_pass_sends_no_gradient_and_computes_no_weight_gradient(ranks: list[dict[str, Any]]) -> None:
    for plain, two in (rank["cost"] for rank in ranks):
        assert two[0] <= 1.67 * plain[0]
        assert two[2] == plain[2] == 3  # root and two blocks, once
        # The ascent adds its forward's and its backward's gathers; the second forward finds what these have gathered.
        assert two[1] < 2 * plain[1]


def test_no_forward_uses_gathered_copies_of_other_weights(ranks: list[dict[str, Any]]) -> None:
    plain, sharded = ranks[0]["losses"]
    assert plain[0] != plain[1]
    assert sharded == pytest.approx(plain, rel=1e-12)


def test_what_needs_full_tensors_is_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refusals"] == [True] * 7


def test_a_model_that_the_user_sharded_works_or_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        alone, replayed, length = rank["messages"]
        assert "pass reduce='global'" in alone
        assert "pass replay=False" in replayed
        assert float(length) == pytest.approx(RHO * 24**0.5, rel=1e-5)  # T = ||gamma|| for 24 ones
