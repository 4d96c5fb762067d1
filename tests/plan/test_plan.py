"""The plan of a step against the step itself, run by two real processes: bytes, FLOPs and memory are the same numbers.

Memory may differ by 10 %: gloo's thread frees a message's buffer a moment later than planned, which is 5 % here.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from samon import UserError
from samon.plan import main as planning
from samon.plan.step import FakeTraining, StepCost, fake_processes, loss, measure, update
from samon.plan.tracker import CostTracker
from samon.trainer import fsdp as sharding
from samon.trainer.config import Config
from samon.trainer.distributed import DistInfo
from samon.trainer.flags import Settings
from samon.trainer.model import create_model
from tests.processes import run_ranks

MODEL = {"model": "vit_tiny_patch16_224", "model_kwargs": {"depth": 2}, "img_size": 64}
CONVOLUTIONS = {"model": "resnet10t", "model_kwargs": {"channels": [16, 16, 16, 16], "stem_width": 8}, "img_size": 64}
BATCH = 16
METHODS = ("adamw", "samon-adamw", "sam-adamw")


def settings(opt: str, **values: object) -> Config:
    args = planning.parse_arguments(["--model", values.pop("model"), "--num-classes", "10", *values.pop("flags", [])])
    return planning.train_config(args, opt).but(**values)


def numbers(cost: StepCost) -> list[int]:
    """[FLOPs, memory, bytes by collective]."""
    names = ("all-gather", "reduce-scatter", "all-reduce", "broadcast")
    return [cost.flops, cost.peak, *(cost.buffers[name] for name in names)]


def real(rank: int, fsdp: bool, about: Settings) -> list[list[int]]:
    """The numbers of each method's second update."""
    costs = []
    dist_info, size = DistInfo(torch.device("cpu"), rank, 2), about["img_size"]
    for opt in METHODS:
        config = settings(opt, flags=["--fsdp"] if fsdp else [], **about)
        torch.manual_seed(0)
        model = create_model(config)
        if fsdp:
            sharding.shard_model(config, model, dist_info, sharding.make_mesh(config, dist_info))
        net = model if fsdp else DistributedDataParallel(model)
        optimizer = create_optimizer_v2(model, opt, lr=0.1, momentum=0.9, weight_decay=0.05)
        x, y = torch.randn(BATCH, 3, size, size), torch.zeros(BATCH, dtype=torch.long)
        sync = {} if fsdp or opt == "adamw" else {"no_sync": net.no_sync}
        for _ in range(2):  # DDP puts its buckets in another order after the first
            update(optimizer, config, lambda: loss(net, x, y, config), **sync)  # noqa: B023
        if fsdp:
            cost = measure(model, optimizer, config, x, y)
        else:
            with FlopCounterMode(display=False) as flops, CostTracker() as tracker:
                update(optimizer, config, lambda: loss(net, x, y, config), **sync)  # noqa: B023
            cost = StepCost(int(flops.get_total_flops()), Counter(), tracker.buffers, tracker.wire)
        costs.append(numbers(cost))
    return costs


def planned(fsdp: bool, about: Settings) -> list[list[int]]:
    flags = ["--fsdp"] if fsdp else []
    with fake_processes(2) as dist_info:
        return [numbers(FakeTraining(settings(o, flags=flags, **about), dist_info).cost(BATCH)) for o in METHODS]


@pytest.mark.slow
def test_sharded_steps_cost_what_was_planned() -> None:
    plan = planned(True, MODEL)
    for rank in run_ranks(real, 2, True, MODEL):
        for (flops, memory, *sent), (flops_planned, memory_planned, *sent_planned) in zip(rank, plan, strict=True):
            assert flops == flops_planned
            assert sent == sent_planned
            assert memory == pytest.approx(memory_planned, rel=0.1)
    plain, on, everything = plan
    assert on[0] < 1.67 * plain[0] < everything[0]
    assert plain[3] == on[3] < everything[3], "SAM-ON's ascent sends no gradient"


def test_ddp_sends_what_was_planned() -> None:
    plan = planned(False, CONVOLUTIONS)
    for rank in run_ranks(real, 2, False, CONVOLUTIONS):
        assert [[row[0], *row[2:]] for row in rank] == [[row[0], *row[2:]] for row in plan]
    assert plan[0][5] > 0, "BatchNorm's buffers are broadcast"


@pytest.mark.slow
def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    with fake_processes(1) as dist_info:
        model = FakeTraining(settings("samon", **MODEL), dist_info)
        known = {size: model.cost(size) for size in (2, 4)}
        for limit in (0, known[4].peak - 1, 3 * known[4].peak):
            best = planning.largest_batch(model, dict(known), limit)
            assert best == 0 or model.cost(best).peak <= limit
            assert model.cost(best + 1).peak > limit


@pytest.mark.slow
def test_the_table_and_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "depth=1", "--gpus", "64", "--batch-size", "2"]
    words += ["--opt", "samon-layerl2-adamw", "--device", "h100", "--memory", "0.5", "--sam-tail", "0.3"]
    words += ["--json", str(tmp_path / "plan.json")]
    plain, everything, on = planning.main([*words, "--fsdp", "--fsdp-replicate", "8", "--amp"])
    assert [row["opt"] for row in (plain, everything, on)] == ["adamw", "sam-adamw", "samon-layerl2-adamw"]
    assert everything["flops"] == 2 * plain["flops"]
    # Within a row of 8 everything is gathered; between the 8 rows each process sends its eighth, twice 7/8 of it.
    assert on["wire"]["all-gather"] == on["buffers"]["all-gather"] * 7 // 8
    compute, sending = plain["flops"] / 989.4e12, sum(plain["wire"].values()) / 50e9
    assert plain["milliseconds"] == pytest.approx((1e3 * max(compute, sending), 1e3 * (compute + sending)))
    assert plain["largest_batch"] >= on["largest_batch"] > 2
    said = capsys.readouterr().out
    assert "64 x 2 images, FSDP, bfloat16" in said
    tail = 1 + 0.3 * (on["flops"] / plain["flops"] - 1)
    assert f"| FLOPs of a training, tail 0.3 | 1.00 | 1.30 | {tail:.2f} |" in said
    assert "estimate" in said
    assert "NVIDIA H100 SXM" in said
    assert json.loads((tmp_path / "plan.json").read_text())["rows"][2]["flops"] == on["flops"]


def test_one_process_has_no_buckets_and_names_are_those_of_the_factory(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "vit_tiny_patch16_224", "--model-kwargs", "depth=1", "--batch-size", "2", "--opt"]
    plain, _, on = planning.main([*words, "SAMON-Muon"])  # of which timm's step reads a tensor
    assert (plain["opt"], plain["wire"]) == ("muon", {})
    assert on["flops"] > plain["flops"]
    printed = capsys.readouterr()
    assert "counting a step of --opt samon-muon on 2 images" in printed.err.lower()  # large models take minutes
    assert "GFLOP" in printed.out
    assert " 0.00" not in printed.out  # units by size
    (one, *_), (many, *_) = (planning.main([*words, "samon", "--gpus", gpus]) for gpus in ("1", "4096"))
    gradients = many["buffers"]["all-reduce"]
    assert many["peak"] == one["peak"] + gradients  # DDP's buckets
    assert many["wire"]["all-reduce"] == gradients * 2 * 4095 // 4096  # a limit: twice the gradients
    assert "all-reduce" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--opt", "adamw"], "is none of samon's"),
        (["--gpus", "1", "--fsdp"], "start several with torchrun"),
        (["--gpus", "6", "--fsdp", "--fsdp-replicate", "4"], "--fsdp-replicate 4"),
        (["--model", "resnet5000"], "unknown model"),
        (["--batch-size", "0"], "at least 1"),
        (["--sam-tail", "1.5"], "--sam-tail"),
    ],
)
def test_mistakes(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        planning.main(["--model", "resnet10t", *words])
