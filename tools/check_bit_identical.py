#!/usr/bin/env python3
"""Check that a change keeps the step bit-identical, by hashes of many short trainings before and after it.

    python tools/check_bit_identical.py --write before.json       # on the old commit
    python tools/check_bit_identical.py --compare before.json     # on the new one; exits with 1 if a hash differs

Each case trains a small network for three updates and hashes its weights, its buffers, the base optimizer's state and
the statistics of the last step. The cases cover every registered name, and for SAM-ON every ascent source, groups,
replay, accumulation, both precisions and the closure. Bits depend on the machine and the torch version, so compare
files of one machine only. Only the public interface is used, so that the script works on both sides of a redesign.
"""

import argparse
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm.optim
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samon
from samon.cli.program import run_script
from samon.errors import RunError

UPDATES = 3
ASCENTS = ("previous", "msam", "fsam", "looksam:2", "aesam")
# Keys keep the sources' former names, so that files of hashes from before stay comparable.
FORMER = {"msam": "momentum", "fsam": "friendly", "looksam:2": "every:2", "aesam": "adaptive"}


class Net(nn.Module):
    """BatchNorm, GroupNorm and LayerNorm layers with an in-place activation, dropout and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.group, self.drop = nn.ReLU(inplace=True), nn.GroupNorm(2, 8), nn.Dropout(0.1)
        self.offset, self.norm, self.head = nn.Parameter(torch.zeros(8)), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.stem(x)))
        x = self.group(x + self.act(self.bn2(self.conv(x))))
        return self.head(self.drop(self.norm(x.mean((2, 3)) + self.offset)))


@dataclass(frozen=True)
class Case:
    """One short training.

    Attributes:
        name: of the optimizer.
        optimizer: keywords of the factory; `step`: keywords of `samon.two_pass`.
        way: `two_pass`, `closure`, `accumulate` (two calls per update), `micro` (two forwards in one call) or
            `autocast` (bfloat16).
    """

    name: str
    optimizer: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    way: str = "two_pass"

    @property
    def key(self) -> str:
        values = {key: FORMER.get(value, value) for key, value in (self.optimizer | self.step).items()}
        options = [f"{key}={value}" for key, value in values.items()]
        return " ".join([self.name, *options, *([] if self.way == "two_pass" else [self.way])])


def cases() -> Iterator[Case]:
    names = [name for name in map(str, timm.optim.list_optimizers()) if samon.is_sam_name(name)]
    for name in sorted(names):
        yield Case(name)
    for name in ("samon", "samon-layerl2-adamw", "samon-fisher", "samon-elemlinf", "sam-eleml2orig", "samnn-momentum"):
        yield from (Case(name, {"ascent": ascent}) for ascent in ASCENTS)
        yield Case(name, {"gsam_alpha": 0.3})
        yield Case(name, {"esam_beta": 0.5})
        yield from (Case(name, way=way) for way in ("closure", "accumulate", "micro", "autocast"))
        yield from (Case(name, {"ascent": ascent}, way="closure") for ascent in ASCENTS)
        yield from (Case(name, step={"bn_stats": which}) for which in ("second", "both"))
        yield Case(name, step={"same_noise": True})
        if name.startswith("samon"):
            yield from (Case(name, step={"groups": groups}) for groups in (2, 4, 8))
            yield from (Case(name, step={"groups": 4, "bn_stats": which}) for which in ("second", "both"))
            yield Case(name, {"ascent": "fsam"}, {"groups": 4})
            yield from (Case(name, {"perturb": "bn2|norm"}, {"replay": replay}) for replay in (True, False))
    yield from (Case(name, {"base_opt": base}) for name in ("sam", "samon") for base in ("lamb", "adan", "muon"))


def run(case: Case) -> str:
    """The hash of a short training: hexadecimal, 16 digits."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    optimizer: Any = timm.optim.create_optimizer_v2(
        net, case.name, lr=0.05, weight_decay=1e-3, rho=0.1, **case.optimizer
    )

    def forward(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        half = case.way == "autocast"

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                return F.cross_entropy(net(x), y)

        return loss

    for _ in range(UPDATES):
        x, y = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
        optimizer.zero_grad()
        if case.way == "closure":
            whole = forward(x, y)

            def closure(whole: Callable[[], Tensor] = whole) -> Tensor:
                optimizer.zero_grad()
                loss = whole()
                loss.backward()
                return loss

            optimizer.step(closure)
            continue
        halves = [forward(a, b) for a, b in zip(x.chunk(2), y.chunk(2), strict=True)]
        if case.way == "accumulate":
            for half in halves:
                samon.two_pass(optimizer, half, loss_scale=0.5, **case.step)
        else:
            samon.two_pass(optimizer, halves if case.way == "micro" else forward(x, y), **case.step)
        optimizer.step()
    return digest(net, optimizer)


def digest(net: nn.Module, optimizer: Any) -> str:
    """A hash of weights, buffers, the base optimizer's tensors and the last step's statistics."""
    tensors = {**net.state_dict(), **optimizer.stats}
    for i, p in enumerate(net.parameters()):
        state = optimizer.state.get(p, {})
        tensors |= {f"state {i} {key}": value for key, value in state.items() if isinstance(value, Tensor)}
    result = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        result.update(name.encode())
        result.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()[:16]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the hashes")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare with hashes that were written before")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases whose key contains this text")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    hashes: dict[str, str] = {}
    for case in cases():
        if args.only in case.key:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    hashes[case.key] = run(case)
                except samon.UserError as error:  # a refusal is a result as well, whatever its text
                    hashes[case.key] = type(error).__name__
    print(f"{len(hashes)} cases, {sum(value == 'UserError' for value in hashes.values())} of them refused")
    if args.write:
        args.write.write_text(json.dumps(hashes, indent=1) + "\n")
    if args.compare:
        before = json.loads(args.compare.read_text())
        moved = [key for key, value in hashes.items() if before.get(key, value) != value]
        missing = sorted(before.keys() - hashes.keys()) if not args.only else []
        print("\n".join([*(f"changed: {key}" for key in moved), *(f"missing: {key}" for key in missing)]))
        if moved or missing:
            raise RunError(f"{len(moved)} of {len(hashes)} cases changed, {len(missing)} are missing")
        print("all bit-identical")


if __name__ == "__main__":
    run_script(main)
