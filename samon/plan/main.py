"""Memory, FLOPs and messages of a training step with SGD or AdamW, SAM and SAM-ON, without a GPU.

    samon-plan --model vit_giant_patch14_224 --gpus 64 --batch-size 64 --opt samon-layerl2 --fsdp --amp --device h100

The step runs on fake tensors, as one process of a group that sends nothing. Bytes and FLOPs are exact; memory is what
tensors hold, without the allocator's gaps and the libraries' own (a few percent, and 1 to 2 GB per GPU). Times with
--device are estimates from the data sheet.
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
from samon.files import check_writable, markdown_table, write_text
from samon.plan.step import FakeTraining, StepCost, fake_processes
from samon.plan.tracker import KINDS
from samon.progress import format_quantity
from samon.registry import variant_of
from samon.trainer.config import FLAGS, Config, check
from samon.trainer.distributed import log_handler
from samon.trainer.flags import parse_kwargs
from samon.trainer.model import check_model_name

Row = dict[str, Any]  # a method's costs
DEVICES = yaml.safe_load((files("samon.plan") / "devices.yaml").read_text())
MODEL_FLAGS = ("model", "num_classes", "img_size", "grad_checkpointing")  # of train.py, with the same meaning here
STEP_FLAGS = ("fsdp", "fsdp_reshard_after_forward", "fsdp_replicate", "amp", "m_sharpness")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="timm model")
    add("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="of the model's constructor")
    add("--num-classes", type=int, default=1000)
    add("--img-size", type=int, help="image size (default: the model's)")
    add("--gpus", type=int, default=1, help="number of processes, one per GPU")
    add("--batch-size", "-b", type=int, default=128, help="images per process")
    add("--opt", type=str.lower, default="samon", help="one of samon; compared with its base alone and with sam")
    add("--m-sharpness", default="device", choices=("device", "global"))
    add("--fsdp", action="store_true", help="sharded (FSDP2) instead of DistributedDataParallel")
    add("--fsdp-reshard-after-forward", default="always", choices=("always", "never"))
    add("--fsdp-replicate", type=int, default=1)
    add("--amp", action="store_true", help="bfloat16")
    add("--grad-checkpointing", action="store_true")
    add("--device", choices=sorted(DEVICES), help="estimate times, and find the largest batch that fits")
    add("--memory", type=float, help="GB per GPU for the largest batch (default: that of --device)")
    add("--sam-tail", type=float, metavar="F", help="also the FLOPs of a training whose last F takes two passes")
    add("--network", type=float, default=50.0, help="GB/s per GPU to other hosts, one way (50: 400 Gb/s)")
    add("--gpus-per-host", type=int, default=8)
    add("--json", type=Path, help="JSON file to write")
    args = parser.parse_args(argv)
    if variant_of(args.opt) is None:
        raise UserError(f"--opt {args.opt} is none of samon's; use one such as samon-layerl2-adamw")
    if args.gpus < 1 or args.batch_size < 1:
        raise UserError("--gpus and --batch-size must be at least 1")
    if args.sam_tail is not None and not 0 < args.sam_tail <= 1:
        raise UserError(f"--sam-tail must be in (0, 1], got {args.sam_tail}")
    if args.json:
        check_writable("--json", args.json)
    return args


def compared_optimizers(opt: str) -> dict[str, str]:
    """The base optimizer alone, SAM, and the one asked for."""
    variant = variant_of(opt)
    assert variant is not None
    return {"plain": variant.base, "SAM": "sam" if variant.base == "sgd" else f"sam-{variant.base}", opt: opt}


def train_config(args: argparse.Namespace, opt: str) -> Config:
    """The configuration of train.py. If weights are sharded, SAM has one perturbation for all processes."""
    values = {key: flag.default for key, flag in FLAGS.items()}
    values |= {key: getattr(args, key) for key in (*MODEL_FLAGS, *STEP_FLAGS)}
    values |= {"opt": opt, "amp_dtype": "bfloat16", "model_kwargs": parse_kwargs(args.model_kwargs)}
    variant = variant_of(opt)
    if args.fsdp and variant is not None and not variant.norms_only:
        values["m_sharpness"] = "global"
    config = Config(**values)
    check_model_name(config)
    check(config, given={})
    return config


def largest_batch(training: FakeTraining, costs: dict[int, StepCost], limit: float) -> int:
    """The largest batch whose step fits in `limit` bytes, 0 if none does.

    Memory is piecewise linear in the batch size, so the line through the two nearest known sizes gives the next guess.

    Args:
        costs: by batch size, at least two; costs of further sizes are added.
    """
    while True:
        below = max((size for size in costs if costs[size].peak <= limit), default=0)
        above = min((size for size in costs if costs[size].peak > limit), default=0)
        if above == below + 1:
            return below
        small, large = (below, above) if below and above else sorted(costs)[-2:] if below else sorted(costs)[:2]
        slope = max(1.0, (costs[large].peak - costs[small].peak) / (large - small))
        guess = max(below + 1, small + int((limit - costs[small].peak) / slope))
        guess = min(guess, above - 1) if above else guess
        costs[guess] = training.cost(guess)


def estimate_ms(cost: StepCost, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds by the data sheet if messages and arithmetic overlap fully, and if they do not overlap. Real kernels
    are slower."""
    device = DEVICES[args.device]
    compute = cost.flops / (device["bfloat16" if args.amp else "float32"] * 1e12)
    link = device["link"] if args.gpus <= args.gpus_per_host else args.network
    send = sum(cost.wire.values()) / (link * 1e9)
    return 1e3 * max(compute, send), 1e3 * (compute + send)


def plan(args: argparse.Namespace) -> list[Row]:
    """A row per optimizer."""
    limit = (args.memory or (DEVICES[args.device]["memory"] if args.device else 0)) * 1e9
    rows = []
    for name, opt in compared_optimizers(args.opt).items():
        with fake_processes(args.gpus) as dist_info:
            training = FakeTraining(train_config(args, opt), dist_info)
            cost = training.cost(args.batch_size)
            row: Row = {"method": name, "opt": opt, "peak": cost.peak, **vars(cost)}
            if args.device:
                row["milliseconds"] = estimate_ms(cost, args)
            if limit:
                other = args.batch_size // 2 or 2
                costs = {args.batch_size: cost, other: training.cost(other)}
                row["largest_batch"] = largest_batch(training, costs, limit)
            rows.append(row)
    return rows


def table(rows: list[Row], args: argparse.Namespace) -> str:
    """Markdown with a column per optimizer."""
    base = rows[0]
    lines = [
        ["", *(row["method"] for row in rows)],
        ["FLOPs", *(f"{format_quantity(r['flops'], 'FLOP')} ({r['flops'] / base['flops']:.2f})" for r in rows)],
        ["peak memory", *(format_quantity(row["peak"], "B", 1024) for row in rows)],
        *([f"- {kind}", *(format_quantity(r["memory"][kind], "B", 1024) for r in rows)] for kind in KINDS),
    ]
    if args.sam_tail is not None:
        shares = (1 + args.sam_tail * (row["flops"] / base["flops"] - 1) for row in rows)
        lines.insert(2, [f"FLOPs of a training, tail {args.sam_tail:g}", *(f"{share:.2f}" for share in shares)])
    collectives = sorted({name for row in rows for name in row["wire"]})
    lines += [[f"{n}, sent", *(format_quantity(row["wire"][n], "B") for row in rows)] for n in collectives]
    lines.append(["sent", *(format_quantity(sum(row["wire"].values()), "B") for row in rows)])
    if "milliseconds" in base:
        times = ("{:.1f} to {:.1f}".format(*row["milliseconds"]) for row in rows)
        lines.append([f"ms on {args.device}, estimate", *times])
    if "largest_batch" in base:
        lines.append(["largest batch that fits", *(str(row["largest_batch"]) for row in rows)])
    how = f"{'FSDP' if args.fsdp else 'DDP'}{', bfloat16' * args.amp}"
    head = f"{args.model}, {args.gpus} x {args.batch_size} images, {how}; per GPU and update"
    return f"{head}\n\n{markdown_table(lines)}"


def main(argv: Sequence[str] | None = None) -> list[Row]:
    args = parse_arguments(argv)
    logging.getLogger("samon").setLevel(logging.INFO)  # large models are counted for minutes
    with warnings.catch_warnings(), log_handler(logging.StreamHandler()):
        warnings.simplefilter("ignore")  # PyTorch's, about running without devices
        torch.set_num_threads(1)
        rows = plan(args)
    print(table(rows, args))
    if args.device:
        sheet = DEVICES[args.device]["sheet"]
        print(f"\nBy the {sheet}: from full overlap of messages and arithmetic to none.")
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        write_text(args.json, json.dumps({"arguments": settings, "rows": rows}, indent=1))
    return rows
