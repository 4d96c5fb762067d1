"""What a training step will cost, before any GPU is there: memory, FLOPs and messages of plain, SAM and SAM-ON.

    samon-plan --model vit_giant_patch14_224 --gpus 64 --batch-size 64 --opt samon-layerl2 --fsdp --amp --device h100

The step runs on fake tensors, as one of so many processes whose messages go nowhere: bytes and FLOPs are exact, memory
is what tensors hold, without the allocator's gaps and the libraries' own (a few percent, and 1 to 2 GB a GPU). Times
by --device are estimates: what the data sheet's numbers would allow.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from samon.errors import UserError
from samon.files import check_writable, write_text
from samon.plan.step import Cost, Planned, pretended
from samon.plan.watch import KINDS
from samon.progress import format_quantity
from samon.registry import variant_of
from samon.trainer.config import Config, check
from samon.trainer.distributed import log_handler
from samon.trainer.flag_rows import TRAIN
from samon.trainer.flags import by_key, parse_kwargs
from samon.trainer.model import check_model_name

DEVICES: dict[str, dict[str, Any]] = yaml.safe_load((files("samon.plan") / "devices.yaml").read_text())


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="timm model")
    add("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="of the model's constructor")
    add("--num-classes", type=int, default=1000)
    add("--img-size", type=int, help="image size; the model's own if not given")
    add("--gpus", type=int, default=1, help="processes, one a GPU")
    add("--batch-size", "-b", type=int, default=128, help="images of a process")
    add("--opt", default="samon", help="one of samon's optimizers; its base alone and sam stand beside it")
    add("--m-sharpness", default="device", choices=("device", "global"))
    add("--fsdp", action="store_true", help="sharded (FSDP2) instead of DistributedDataParallel")
    add("--fsdp-reshard-after-forward", default="always", choices=("always", "never"))
    add("--fsdp-replicate", type=int, default=1)
    add("--amp", action="store_true", help="bfloat16")
    add("--grad-checkpointing", action="store_true")
    add("--device", choices=sorted(DEVICES), help="estimate times, and find the largest batch that fits")
    add("--memory", type=float, help="GB of a GPU for the largest batch; --device's own if not given")
    add("--network", type=float, default=50.0, help="GB/s of a GPU to other hosts, one way (50: 400 Gb/s)")
    add("--gpus-per-host", type=int, default=8)
    add("--json", type=Path, help="write the numbers there")
    args = parser.parse_args(argv)
    if variant_of(args.opt) is None:
        raise UserError(f"--opt {args.opt} is none of samon's; use one such as samon-layerl2-adamw")
    if args.gpus < 1 or args.batch_size < 1:
        raise UserError("--gpus and --batch-size are at least 1")
    if args.json:
        check_writable("--json", args.json)
    return args


def methods(opt: str) -> dict[str, str]:
    """The optimizers that are compared: the base alone, SAM and the one asked for."""
    variant = variant_of(opt)
    assert variant is not None  # `arguments` has looked
    base = "" if variant.base == "sgd" else f"-{variant.base}"
    return {"plain": variant.base, "SAM": f"sam{base}", opt: opt}


def settings(args: argparse.Namespace, opt: str) -> Config:
    """train.py's, for one method. SAM of sharded weights is one for all processes."""
    values: dict[str, Any] = {key: flag.default for key, flag in by_key(TRAIN).items()}
    values |= {"model": args.model, "num_classes": args.num_classes, "img_size": args.img_size, "opt": opt}
    sharding = ("fsdp", "fsdp_reshard_after_forward", "fsdp_replicate")
    values |= {key: getattr(args, key) for key in sharding}
    values |= {"amp": args.amp, "amp_dtype": "bfloat16", "grad_checkpointing": args.grad_checkpointing}
    values["model_kwargs"] = parse_kwargs(args.model_kwargs)
    variant = variant_of(opt)
    shared_out = args.fsdp and variant is not None and not variant.norms_only
    values["m_sharpness"] = "global" if shared_out else args.m_sharpness
    config = Config(**values)
    check_model_name(config)
    check(config, given={})
    return config


def largest_batch(planned: Planned, known: dict[int, Cost], limit: float) -> int:
    """The most images whose step fits `limit` bytes, exactly: memory grows by equal steps with the batch, which tells
    where to look. `known`: costs by batch size, two or more; what is tried is added."""

    def fits(size: int) -> bool:
        if size not in known:
            known[size] = planned.cost(size)
        return known[size].peak <= limit

    small, large = min(known), max(known)
    slope = (known[large].peak - known[small].peak) / (large - small)
    guess = int(large + (limit - known[large].peak) / slope) if slope > 0 else 2 * large
    fitting, beyond = 0, 0  # 0: none is known to be too large
    tries = iter((guess, guess + 1, guess - 1))
    while not beyond or beyond - fitting > 1:
        size = next(tries, (fitting + beyond) // 2 if beyond else 2 * fitting or 1)
        if not fitting < size or (beyond and size >= beyond):
            continue
        if fits(size):
            fitting = size
        else:
            beyond = size
    return fitting


def estimate(cost: Cost, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds by the data sheet alone: (everything overlaps, nothing does). Real kernels reach a part of it."""
    device = DEVICES[args.device]
    compute = cost.flops / (device["bfloat16" if args.amp else "float32"] * 1e12)
    link = device["link"] if args.gpus <= args.gpus_per_host else args.network
    sending = sum(cost.wire.values()) / (link * 1e9)
    return 1e3 * max(compute, sending), 1e3 * (compute + sending)


def plan(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method."""
    limit = (args.memory or (DEVICES[args.device]["memory"] if args.device else 0)) * 1e9
    rows = []
    for name, opt in methods(args.opt).items():
        with pretended(args.gpus) as world:
            planned = Planned(settings(args, opt), world)
            known = {args.batch_size: planned.cost(args.batch_size)}
            cost = known[args.batch_size]
            row: dict[str, Any] = {"method": name, "opt": opt, "flops": cost.flops, "peak": cost.peak}
            row |= {"memory": cost.memory, "messages": cost.messages, "buffers": cost.buffers, "wire": cost.wire}
            if args.device:
                row["milliseconds"] = estimate(cost, args)
            if limit:
                other = args.batch_size // 2 or 2
                known[other] = planned.cost(other)
                row["largest_batch"] = largest_batch(planned, known, limit)
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Markdown, a column for each method."""
    how = "FSDP" if args.fsdp else "DDP"
    plain = rows[0]
    lines: list[tuple[str, list[str]]] = [
        ("FLOPs", [f"{format_quantity(row['flops'], 'FLOP')} ({row['flops'] / plain['flops']:.2f})" for row in rows]),
        ("peak memory", [format_quantity(row["peak"], "B", 1024) for row in rows]),
    ]
    lines += [(f"- {kind}", [format_quantity(row["memory"].get(kind, 0), "B", 1024) for row in rows]) for kind in KINDS]
    sent = sorted({name for row in rows for name in row["wire"]})
    lines += [(f"{name}, sent", [format_quantity(row["wire"].get(name, 0), "B") for row in rows]) for name in sent]
    lines.append(("sent", [format_quantity(sum(row["wire"].values()), "B") for row in rows]))
    if "milliseconds" in plain:
        spans = [f"{row['milliseconds'][0]:.1f} to {row['milliseconds'][1]:.1f}" for row in rows]
        lines.append((f"ms on {args.device}, estimate", spans))
    if "largest_batch" in plain:
        lines.append(("largest batch that fits", [str(row["largest_batch"]) for row in rows]))
    head = f"{args.model}, {args.gpus} x {args.batch_size} images, {how}{', bfloat16' * args.amp}; per GPU and update"
    names = [row["method"] for row in rows]
    body = [f"| {' | '.join(['', *names])} |", "|---" * (len(names) + 1) + "|"]
    return "\n".join([head, "", *body, *(f"| {' | '.join([name, *cells])} |" for name, cells in lines)])


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args = arguments(argv)
    logging.getLogger("samon").setLevel(logging.INFO)
    with warnings.catch_warnings(), log_handler(logging.StreamHandler()):  # large models are counted for minutes
        warnings.simplefilter("ignore")  # of PyTorch's, about running without devices
        torch.set_num_threads(1)
        rows = plan(args)
    print(table(rows, args))
    if args.device:
        print(f"\nBy {DEVICES[args.device]['sheet']}: if all messages hide behind the arithmetic, and if none does.")
    if args.json:
        write_text(
            args.json, json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows}, indent=1)
        )
    return rows
