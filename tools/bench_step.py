#!/usr/bin/env python3
"""Cost of a step for all variants, side by side in one run: exact FLOPs, paired times, peak memory.

    python tools/bench_step.py --model resnet50 --img-size 128 --batch-size 16
    python tools/bench_step.py --model vit_tiny_patch16_224 --img-size 64 --batch-size 32
    python tools/bench_step.py --model small_blocks --batch-size 8 --m 8 --no-memory --rounds 60     # overhead
    python tools/bench_step.py --model resnet50 --batch-size 128 --device cuda --amp --channels-last

Every round runs each variant once, and ratios are taken within a round, so drift of the machine cancels. Times cover
forward, backward and optimizer step (CUDA events on a GPU). Peak memory is the growth of the largest resident size
during two steps in a fresh process (CPU), or the allocator's peak above what model and optimizer hold (GPU). The
learning rate is zero and the batch is always the same, so `ascent aesam` makes its ascent pass in every update here.
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import samon
from samon.files import markdown_table
from samon.scope import norm_modules
from samon.trainer.flops import count_flops

Step = Callable[[], object]
Row = dict[str, Any]  # of the table; of a variant that cannot run, its name and the reason
SMALL = "small_blocks"
# Largest FLOPs relative to a plain step, by prefix of the row's name. The time should be within 10 % of it.
TARGETS = {
    "SAM-ON layer4, replay": 1.11,
    "SAM-ON, m =": 1.67,
    "SAM-ON, ascent previous": 1.01,
    "SAM-ON, ascent msam": 1.01,
}
SMALL_TIME = 1.75  # target for `small_blocks`, where Python and dispatch dominate


class SmallBlocks(nn.Module):
    """200 tiny LayerNorm blocks: measures the Python and dispatch overhead of 400 tensors."""

    num_classes = 10

    def __init__(self, blocks: int = 200, width: int = 16) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3 * 8 * 8, width), nn.Linear(width, self.num_classes)
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Bench:
    """A model, a batch and the variants, each a function that runs a full step."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self.updates_of: dict[Step, int] = {}  # updates per step, if more than one
        torch.manual_seed(0)
        if args.model == SMALL:
            self.place(SmallBlocks(), 8)
            return
        kwargs = {} if args.img_size is None else {"img_size": args.img_size}
        try:
            model = timm.create_model(args.model, **kwargs)
        except TypeError:  # convolutional networks take any size
            model = timm.create_model(args.model)
        self.place(model, args.img_size or resolve_model_data_config(model)["input_size"][-1])

    def place(self, model: Any, size: int) -> None:
        args = self.args
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=layout).train()
        self.x = torch.randn(args.batch_size, 3, size, size, device=self.device).to(memory_format=layout)
        self.y = torch.randint(model.num_classes, (args.batch_size,), device=self.device)
        torch._dynamo.config.recompile_limit = 64  # every variant compiles its own graphs; a training has two
        self.run: Callable[[Tensor], Tensor] = torch.compile(self.model) if args.compile else self.model

    def loss(self, x: Tensor | None = None, y: Tensor | None = None, model: nn.Module | None = None) -> Tensor:
        amp = torch.autocast(self.device.type, torch.bfloat16) if self.args.amp else nullcontext()
        with amp:
            output = (model or self.run)(self.x if x is None else x)
        return F.cross_entropy(output.float(), self.y if y is None else y)

    def optimizer(self, name: str, **kwargs: Any) -> torch.optim.Optimizer:
        # A learning rate of zero: every step of every variant sees the same weights.
        opt = create_optimizer_v2(self.model, name, lr=0.0, weight_decay=1e-4, **kwargs)
        if self.args.compile and (sam := samon.sam_of(opt)) is not None:
            sam.compile()
        return opt

    def updates(self, opt: torch.optim.Optimizer, backward: Callable[[], object], count: int = 1) -> Step:
        """A function that makes `count` updates with the gradient that `backward` accumulates."""

        def step() -> None:
            for _ in range(count):
                opt.zero_grad()
                backward()
                opt.step()

        self.updates_of[step] = count
        return step

    def plain(self, name: str = "sgd") -> Step:
        return self.updates(self.optimizer(name), lambda: self.loss().backward())

    def ascent_source(self, updates: int = 1, **options: object) -> Step:
        """SAM-ON with an ascent source (`samon.engines.ascent`), averaged over `updates`."""
        opt = self.optimizer("samon-momentum", momentum=0.9, **options)
        return self.updates(opt, lambda: samon.two_pass(opt, self.loss), updates)

    def two_pass(self, name: str, perturb: str | None = None, groups: int = 1, replay: bool = True) -> Step:
        opt = self.optimizer(name, perturb=perturb)
        model = self.model if perturb else None  # replay replaces layer outputs, so it runs the uncompiled model
        forward = partial(self.loss, model=model)
        return self.updates(opt, lambda: samon.two_pass(opt, forward, groups=groups, replay=replay))

    def naive(self) -> Step:
        """SAM-ON as in other implementations: full gradients in both passes, all weights saved."""
        opt = self.optimizer("samon")
        sam = samon.sam_of(opt)
        assert sam is not None

        def backward() -> None:
            self.loss().backward()
            saved = [p.detach().clone() for p in self.model.parameters()]
            with sam.perturbed([p.grad for p in sam.perturbed_parameters().values()]):
                opt.zero_grad()
                self.loss().backward()
            with torch.no_grad():
                for p, value in zip(self.model.parameters(), saved, strict=True):
                    p.copy_(value)

        return self.updates(opt, backward)

    def loop(self, m: int) -> Step:
        """SAM-ON on sub-batches of m images, one after another."""
        opt = self.optimizer("samon")

        def backward() -> None:
            for x, y in zip(self.x.split(m), self.y.split(m), strict=True):
                samon.two_pass(opt, partial(self.loss, x, y, self.model), loss_scale=m / len(self.x))

        return self.updates(opt, backward)

    def other(self) -> Step:
        """pytorch-optimizer's SAM over all parameters."""
        from pytorch_optimizer import SAM

        opt = SAM(self.model.parameters(), torch.optim.SGD, rho=0.05, lr=0.0, momentum=0.9, nesterov=True)

        def step() -> None:
            self.loss().backward()
            opt.first_step(zero_grad=True)
            self.loss().backward()
            opt.second_step(zero_grad=True)

        return step

    def variants(self) -> dict[str, Callable[[], Step]]:
        late, batch = self.args.perturb or late_layers(self.model), self.args.batch_size
        variants: dict[str, Callable[[], Step]] = {  # "SAM-ON" is m = batch size
            "plain SGD": self.plain,
            "SAM, all parameters": lambda: self.two_pass("sam"),
            "SAM-ON, full gradients": self.naive,
            f"SAM-ON, m = {batch}": lambda: self.two_pass("samon"),
            "plain Muon": lambda: self.plain("muon"),  # its own step orthogonalizes every matrix
            "SAM-ON, muon": lambda: self.two_pass("samon-muon"),
            f"SAM-ON {late}, no replay": lambda: self.two_pass("samon", late, replay=False),
            f"SAM-ON {late}, replay": lambda: self.two_pass("samon", late),
        }
        for source, updates in (("previous", 1), ("msam", 1), ("fsam", 1), ("looksam:5", 5), ("aesam", 1)):
            variants[f"SAM-ON, ascent {source}"] = partial(self.ascent_source, updates, ascent=source)
        variants["SAM-ON, GSAM"] = partial(self.ascent_source, gsam_alpha=0.4)
        if not self.args.compile:  # it perturbs different tensors in every update
            variants["SAM-ON, ESAM, beta = 0.5"] = partial(self.ascent_source, esam_beta=0.5)
        norms = norm_modules(self.model).values()
        has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in norms)
        for m in self.args.m or sorted({batch, 16, 4, 1}, reverse=True):
            if m < batch and batch % m == 0:
                variants[f"SAM-ON, m = {m}, groups"] = partial(self.two_pass, "samon", groups=batch // m)
                # BatchNorm after global pooling or at 1 px has no statistics for one sample.
                if not (has_batch_norm and m == 1):
                    variants[f"SAM-ON, m = {m}, loop"] = partial(self.loop, m)
        if importlib.util.find_spec("pytorch_optimizer"):
            variants["pytorch-optimizer SAM"] = self.other
        return variants

    def timed(self, step: Step) -> float:
        """Milliseconds per update."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / self.updates_of.get(step, 1)
        begin = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - begin) / self.updates_of.get(step, 1)


def late_layers(model: nn.Module) -> str:
    """The paper's B3 (section 4.3): the last stage of a convolutional network, the last third of a transformer."""
    blocks = getattr(model, "blocks", None)
    if hasattr(model, "layer4"):
        return "layer4"
    for name in ("stages", "layers", "features"):
        if isinstance(part := getattr(model, name, None), nn.Sequential | nn.ModuleList):
            return rf"^{name}\.{len(part) - 1}\."
    if blocks is None:
        raise samon.UserError("this model has neither layer4, stages, layers nor blocks; name late layers by --perturb")
    third = range(len(blocks) - len(blocks) // 3, len(blocks))
    return rf"^blocks\.({'|'.join(map(str, third))})\.|^norm"


def gpu_memory(bench: Bench, step: Step) -> float:
    """Peak in MiB above the memory held between steps."""
    bench.model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cpu_memory(variant: str) -> float:
    """`resident_growth` in MiB, measured in a fresh process that runs only this variant."""
    command = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--only", variant]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(run.stdout.splitlines()[-1])


def resident_growth(bench: Bench, step: Step) -> float:
    def status(key: str) -> int:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(key))

    before = status("VmRSS")
    for _ in range(2):
        step()
    return (status("VmHWM") - before) / 1024


def measure(bench: Bench, rounds: int, memory: bool) -> list[Row]:
    steps, refused = {}, {}
    for name, make in bench.variants().items():
        if bench.args.rows and name != "plain SGD" and not re.search(bench.args.rows, name):
            continue
        try:
            step = make()
            for _ in range(2):  # warm-up: replay plans, compilation, allocator
                step()
            steps[name] = step
        except ValueError as error:  # such as one value per channel in a BatchNorm layer
            refused[name] = " ".join(str(error).split())
    eager = not bench.args.compile
    each = {name: bench.updates_of.get(step, 1) for name, step in steps.items()}
    counted = {name: count_flops(step) / each[name] if eager else None for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(bench.timed(step))
    plain = times["plain SGD"]
    rows = []
    for name, step in steps.items():
        ratios = [t / p for t, p in zip(times[name], plain, strict=True)]
        peak = None
        if memory:
            peak = gpu_memory(bench, step) if bench.device.type == "cuda" else cpu_memory(name)
        count, base = counted[name], counted["plain SGD"]
        rows.append(
            {
                "variant": name,
                "flops_ratio": count / base if count and base else None,
                "time_ratio": statistics.median(ratios),
                "time_ratio_min": min(ratios),
                "time_ratio_max": max(ratios),
                "ms": statistics.median(times[name]),
                "peak_mib": peak,
            }
        )
    return rows + [{"variant": name, "refused": why} for name, why in refused.items()]


def table(rows: list[Row]) -> str:
    lines = [["step", "FLOPs", "target", "time", "min to max", "ms", "peak MiB"]]
    for r in rows:
        name = r["variant"].replace("|", r"\|")
        if "refused" in r:
            lines.append([name, "-", "-", "-", r["refused"], "-", "-"])
            continue
        flop = "" if r["flops_ratio"] is None else f"{r['flops_ratio']:.3f}"
        peak = "" if r["peak_mib"] is None else f"{r['peak_mib']:.0f}"
        target = next((f"{wanted:.2f}" for start, wanted in TARGETS.items() if r["variant"].startswith(start)), "")
        span = f"{r['time_ratio_min']:.2f} to {r['time_ratio_max']:.2f}"
        lines.append([name, flop, target, f"{r['time_ratio']:.2f}", span, f"{r['ms']:.1f}", peak])
    return markdown_table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model, in the variants that support it"
    )
    parser.add_argument("--perturb", help="late layers for the replay rows (default: the last stage)")
    parser.add_argument("--m", type=int, nargs="*", help="sub-batch sizes (default: batch, 16, 4, 1)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="also write the rows as JSON")
    parser.add_argument("--rows", help="regular expression: measure only the variants that match, and plain SGD")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    bench = Bench(args)
    if args.only:
        print(resident_growth(bench, bench.variants()[args.only]()))
        return
    rows = measure(bench, args.rounds, not args.no_memory)
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    shape = "x".join(map(str, bench.x.shape))
    kind = "bf16 autocast" if args.amp else "float32"
    print(f"{args.model}, {shape}, {kind}, {name}, torch {torch.__version__}; median of {args.rounds} paired rounds\n")
    print(table(rows))
    if args.model == SMALL:
        print(f"\ntarget of SAM-ON's time: {SMALL_TIME}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
