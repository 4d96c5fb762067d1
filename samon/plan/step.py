"""One update on fake tensors and PyTorch's fake process group: FLOPs, memory by kind, messages. No data, no waiting."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import samon
from samon.engines.fsdp import average_gradients
from samon.plan.watch import GRADIENTS, OPTIMIZER, PARAMETERS, Watch
from samon.sam import to_local
from samon.trainer import fsdp as sharding
from samon.trainer.config import Config
from samon.trainer.distributed import DistInfo
from samon.trainer.model import create_model, make_autocast, resolve_data_config

log = logging.getLogger("samon")


@dataclass(frozen=True)
class Cost:
    """Of one update of one process."""

    flops: int
    memory: dict[str, int]  # bytes at the peak by kind
    messages: dict[str, int]  # by collective
    buffers: dict[str, int]  # bytes that the messages are about
    wire: dict[str, int]  # bytes that this process sends, in a ring

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


@contextmanager
def pretended(processes: int) -> Iterator[DistInfo]:
    """This process as rank 0 of a group whose messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield DistInfo(torch.device("cpu"), 0, processes)
    finally:
        dist.destroy_process_group()


class Planned:
    """A model and its optimizer as `train.py` makes them, on fake tensors.

    Args:
        config: settings of train.py: model, opt, fsdp and its options, amp, m_sharpness, grad_checkpointing, img_size.
    """

    def __init__(self, config: Config, world: DistInfo) -> None:
        self.config, self.world = config, world
        with torch.device("meta"):
            model: Any = create_model(config)
            if config.grad_checkpointing:
                model.set_grad_checkpointing(enable=True)
        self.model = model
        mesh = sharding.make_mesh(config, world) if config.fsdp else None
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            self.model.to_empty(device="cpu")
            if mesh is not None:
                sharding.shard_model(config, self.model, world, mesh)
            self.optimizer = create_optimizer_v2(self.model, config.opt, lr=0.1, momentum=0.9, weight_decay=0.05)
        self.image = resolve_data_config(config, self.model)["input_size"]
        self.started = False

    def cost(self, batch_size: int) -> Cost:
        """Of an update on so many images, its optimizer's state being there."""
        log.info("counting a step of --opt %s on %d images", self.config.opt, batch_size)
        with self.fake:
            x, y = torch.empty(batch_size, *self.image), torch.zeros(batch_size, dtype=torch.long)
            if not self.started:  # makes the optimizer's state
                update(self.model, self.optimizer, self.config, partial(loss, self.model, x, y, self.config))
                self.started = True
            return measured(self.model, self.optimizer, self.config, x, y)


def loss(net: nn.Module, x: Tensor, y: Tensor, config: Config) -> Tensor:
    with make_autocast(config, x.device)():
        output = net(x)
        return F.cross_entropy(output[0] if isinstance(output, tuple) else output, y)


def update(model: nn.Module, optimizer: Any, config: Config, forward: Callable[[], Tensor], **how: Any) -> None:
    """As train.py does one."""
    optimizer.zero_grad()
    if samon.sam_of(optimizer) is None:
        forward().backward()
    else:
        samon.two_pass(optimizer, forward, reduce=config.m_sharpness, replay=not config.fsdp, **how)
    if config.fsdp:
        average_gradients(p for group in optimizer.param_groups for p in group["params"])
    optimizer.step()


def measured(model: nn.Module, optimizer: Any, config: Config, x: Tensor, y: Tensor, net: Any = None) -> Cost:
    """An update's cost; `net` is the model as it is called, where that is not the model itself."""
    watch, forward = Watch(), partial(loss, net or model, x, y, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    optimizer.zero_grad()
    watch.hold(map(to_local, model.parameters()), PARAMETERS)
    watch.hold(map(to_local, model.buffers()), PARAMETERS)
    watch.hold(map(to_local, states), OPTIMIZER)
    gc.collect()  # what an earlier update left in cycles
    sync = {"no_sync": net.no_sync} if hasattr(net, "no_sync") else {}
    with watch.watch_gradients(parameters), FlopCounterMode(display=False) as flops, watch:
        watch.hold([x, y], "activations")
        update(model, optimizer, config, forward, **sync)
    memory = dict(watch.peak)
    counts = [dict(counter) for counter in (watch.messages, watch.buffers, watch.wire)]
    if not config.fsdp and dist.get_world_size() > 1:
        counts[1:] = [_with(each, more) for each, more in zip(counts[1:], _ddp(model, parameters), strict=True)]
        memory[GRADIENTS] = memory.get(GRADIENTS, 0) + sum(p.nbytes for p in parameters)  # DDP's buckets
    return Cost(int(flops.get_total_flops()), memory, *counts)


def _ddp(model: nn.Module, parameters: list[Tensor]) -> list[dict[str, int]]:
    """What DistributedDataParallel sends in an update, which the fake process group does not run: every gradient once;
    the buffers are broadcast before the forward that sends: (bytes, bytes in a ring). How many messages: up to it."""
    ranks = dist.get_world_size()
    gradients, buffers = sum(p.nbytes for p in parameters if p.requires_grad), sum(b.nbytes for b in model.buffers())
    sent = {"all-reduce": gradients} | ({"broadcast": buffers} if buffers else {})
    wire = {"all-reduce": 2 * gradients * (ranks - 1) // ranks} | ({"broadcast": buffers} if buffers else {})
    return [sent, wire]


def _with(one: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + more.get(key, 0) for key in one | more}
