"""Models sharded by FSDP2 against DistributedDataParallel on real gloo processes.

Tolerance 1e-12 relative, float64: reduce-scatter may add in another order than all-reduce. `samon` perturbs by each
process's own gradient (device) or by the mean (global); sharded perturbed parameters can only do the latter.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import samon
from samon import UserError
from samon.engines.fsdp import average_gradients, no_sync
from samon.geometry import GEOMETRIES
from samon.scope import select
from tests.processes import run_ranks

CASES = [
    (scope, geometry, reduce, parts)
    for scope in ("sam", "samon", "samnn")
    for geometry in GEOMETRIES
    for reduce in (("device", "global") if scope == "samon" else ("global",))
    for parts in (1, 2)
]


def make() -> nn.Module:
    torch.manual_seed(0)
    how: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **how).double().train()


def shard(model: nn.Module, mesh: Any, whole: set[nn.Parameter], **how: Any) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=whole, **how)
    return fully_shard(model, mesh=mesh, ignored_params=whole, **how)


def norms_of(model: nn.Module) -> set[nn.Parameter]:
    return set(select(model, "samon", None).parameters.values())


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    images = torch.randn(4, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (4,), generator=generator)


def train(rank: int, mesh: Any, scope: str, geometry: str, reduce: str, parts: int, base: str = "momentum") -> Tensor:
    """Two updates, under FSDP where there is a mesh and else under DDP: the whole parameters, and what was measured."""
    model = make()
    if mesh is None:
        net: nn.Module = DistributedDataParallel(model)
        sync = net.no_sync
    else:
        net = shard(model, mesh, norms_of(model) if scope == "samon" else set())
        sync = no_sync(model)
    name = "-".join(filter(None, (scope, geometry, base)))
    opt = create_optimizer_v2(model, name, lr=0.1, rho=0.3 if geometry != "elemlinf" else 0.05, weight_decay=1e-3)
    measured = []
    for step in range(2):
        opt.zero_grad()
        pairs = list(zip(*(t.chunk(parts) for t in batch(step, rank)), strict=True))
        forwards = [lambda x=x, y=y: F.cross_entropy(net(x), y) for x, y in pairs]
        if reduce == "global":
            samon.two_pass(opt, forwards, reduce="global", no_sync=sync)
        else:
            for i, forward in enumerate(forwards):
                with nullcontext() if i + 1 == parts else sync():
                    samon.two_pass(opt, forward, no_sync=sync, loss_scale=1 / parts)
        if mesh is not None:
            average_gradients(model.parameters())
        opt.step()
        measured += [samon.sam_of(opt).stats[key].detach().reshape(1) for key in ("eps_norm", "ascent_grad_norm")]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([*(p.detach().flatten() for p in whole), *measured])


def compare(rank: int, world: int, cases: list[Any]) -> list[float]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if world == 4 else None
    mesh = mesh or init_device_mesh("cpu", (world,))
    found = []
    for case in cases:
        want, got = train(rank, None, *case), train(rank, mesh, *case)
        found.append(((got - want).norm() / want.norm()).item())
    return found


def assert_equal(world: int, cases: list[Any]) -> None:
    for apart in run_ranks(compare, world, world, cases, timeout=240):
        assert {str(case): error for case, error in zip(cases, apart, strict=True) if error > 1e-12} == {}


@pytest.mark.parametrize("scope", ["sam", "samon", "samnn"])
def test_two_processes_equal_ddp(scope: str) -> None:
    assert_equal(2, [case for case in CASES if case[0] == scope])


def test_three_processes_with_parts_of_other_sizes_equal_ddp() -> None:
    """24 rows do not divide by 5 heads and classes: parts differ in size, some are empty."""
    assert_equal(3, [("sam", "layerl2", "global", 2), ("samon", "layerl2", "device", 1), ("samnn", "", "global", 1)])


def test_hybrid_sharding_equals_ddp() -> None:
    """2 x 2: parameters are cut within a row of the mesh, the same in every column; norms add up within the row."""
    assert_equal(4, [("sam", "layerl2", "global", 1), ("samon", "layerl2", "device", 2), ("sam", "", "global", 2)])


def cost(rank: int) -> list[list[float]]:
    """FLOPs and messages of a plain step and a two-pass step."""
    mesh = init_device_mesh("cpu", (2,))
    model = make()
    shard(model, mesh, norms_of(model))
    opt = create_optimizer_v2(model, "samon", lr=0.1)
    x, y = batch(0, rank)

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    found = []
    for step in (lambda: loss().backward(), lambda: samon.two_pass(opt, loss)):
        step()  # lazy set-up
        opt.zero_grad()
        with FlopCounterMode(display=False) as flops, CommDebugMode() as messages:
            step()
        counts = messages.get_comm_counts().items()
        sent = [sum(n for op, n in counts if kind in str(op)) for kind in ("gather", "scatter")]
        found.append([flops.get_total_flops(), *sent])
    return found


def test_the_ascent_pass_sends_no_gradient_and_computes_no_weight_gradient() -> None:
    for plain, two in run_ranks(cost):
        assert two[0] <= 1.67 * plain[0]
        assert two[2] == plain[2] == 3  # root and two blocks, once
        # The ascent adds its forward's and its backward's gathers; the second forward finds what these have gathered.
        assert two[1] < 2 * plain[1]


def used_as_users_do(rank: int) -> list[str]:
    """Normalization layers sharded like everything else."""
    mesh = init_device_mesh("cpu", (2,))
    said = []
    for how in ({}, {"reduce": "global", "replay": True}, {"reduce": "global"}):
        model = make()
        shard(model, mesh, set())
        late = "blocks.1" if "replay" in how else None
        opt = create_optimizer_v2(model, "samon-layerl2", lr=0.1, perturb=late)
        try:
            samon.two_pass(opt, lambda model=model: F.cross_entropy(model(batch(0, rank)[0]), batch(0, rank)[1]), **how)
            said.append(f"{samon.sam_of(opt).stats['eps_norm'].item():.6f}")
        except UserError as error:
            said.append(str(error))
    return [torch.tensor([ord(c) for c in text]) for text in said]


def test_a_model_that_the_user_sharded_works_or_is_refused_by_name() -> None:
    for rank in run_ranks(used_as_users_do):
        said = ["".join(map(chr, letters.tolist())) for letters in rank]
        assert "pass reduce='global'" in said[0]
        assert "pass replay=False" in said[1]
        assert 0 < float(said[2]) < 1
