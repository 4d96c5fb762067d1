"""Cost of one update on fake tensors with PyTorch's fake process group: FLOPs, memory by kind, messages."""

import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import samon
from samon.engines.fsdp import average_gradients
from samon.plan.tracker import GRADIENTS, OPTIMIZER, PARAMETERS, REST, CostTracker
from samon.trainer import fsdp as sharding
from samon.trainer.config import Config
from samon.trainer.distributed import DistInfo
from samon.trainer.flops import FORMULAS
from samon.trainer.model import create_train_model, make_autocast, resolve_data_config
from samon.two_pass import ContextFactory, Forward

log = logging.getLogger("samon")


@dataclass(frozen=True)
class StepCost:
    """Cost of one update of one process: FLOPs, peak bytes by kind, and by collective the bytes of message buffers and
    the bytes that the process sends in a ring."""

    flops: int
    memory: Counter[str]
    buffers: Counter[str]
    wire: Counter[str]

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


@contextmanager
def fake_processes(count: int) -> Iterator[DistInfo]:
    """Make this process rank 0 of a group that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield DistInfo(torch.device("cpu"), 0, count)
    finally:
        dist.destroy_process_group()


class FakeTraining:
    """The model and the optimizer of a run of `train.py`, on fake tensors."""

    def __init__(self, config: Config, dist_info: DistInfo) -> None:
        self.config = config
        with torch.device("meta"):
            self.model = create_train_model(config)
        mesh = sharding.make_mesh(config, dist_info) if config.fsdp else None
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            self.model.to_empty(device="cpu")
            if mesh is not None:
                sharding.shard_model(config, self.model, dist_info, mesh)
            self.optimizer = create_optimizer_v2(self.model, config.opt, lr=0.1, momentum=0.9, weight_decay=0.05)
        self.image_size = resolve_data_config(config, self.model)["input_size"]
        self.has_state = False

    def cost(self, batch_size: int) -> StepCost:
        """Cost of an update with existing optimizer state."""
        log.info("counting a step of --opt %s on %d images", self.config.opt, batch_size)
        # timm's Muon reads from a tensor how many updates its AdamW parameters had; fake tensors hold no numbers.
        with self.fake, patch("timm.optim.adamw._get_value", lambda step: 1.0, create=True):
            x, y = torch.empty(batch_size, *self.image_size), torch.zeros(batch_size, dtype=torch.long)
            if not self.has_state:
                update(self.optimizer, self.config, partial(loss, self.model, x, y, self.config))
                self.has_state = True
            return measure(self.model, self.optimizer, self.config, x, y)


def loss(model: nn.Module, x: Tensor, y: Tensor, config: Config) -> Tensor:
    with make_autocast(config, x.device)():
        output = model(x)
        return F.cross_entropy(output[0] if isinstance(output, tuple) else output, y)


def update(optimizer: Optimizer, config: Config, forward: Forward, no_sync: ContextFactory | None = None) -> None:
    """One update as in train.py; `no_sync` is the context of the ascent pass."""
    optimizer.zero_grad()
    if samon.sam_of(optimizer) is None:
        forward().backward()
    else:
        samon.two_pass(optimizer, forward, reduce=config.m_sharpness, replay=not config.fsdp, no_sync=no_sync)
    if config.fsdp:
        average_gradients(p for group in optimizer.param_groups for p in group["params"])
    optimizer.step()


def measure(model: nn.Module, optimizer: Optimizer, config: Config, x: Tensor, y: Tensor) -> StepCost:
    """Cost of an update. DistributedDataParallel, which the fake process group does not run, is added: every gradient
    is sent once from buckets of its size, and buffers are broadcast before the forward that synchronizes."""
    tracker = CostTracker()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values()]
    optimizer.zero_grad()
    tracker.add([*model.parameters(), *model.buffers()], PARAMETERS)
    tracker.add(states, OPTIMIZER)
    gc.collect()  # reference cycles of an earlier update
    with tracker.track_gradients(parameters), FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops, tracker:
        tracker.add([x, y], REST)
        update(optimizer, config, partial(loss, model, x, y, config))
    memory, ranks = tracker.peak.copy(), dist.get_world_size()
    if not config.fsdp and ranks > 1:
        gradients, buffers = sum(p.nbytes for p in parameters), sum(b.nbytes for b in model.buffers())
        memory += Counter({GRADIENTS: gradients})
        tracker.buffers += Counter({"all-reduce": gradients, "broadcast": buffers})
        tracker.wire += Counter({"all-reduce": 2 * gradients * (ranks - 1) // ranks, "broadcast": buffers})
    return StepCost(int(flops.get_total_flops()), memory, tracker.buffers, tracker.wire)
