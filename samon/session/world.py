"""The processes of a run: how they find each other, and which run they are a restart of."""

import importlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b

import torch
import torch.distributed as dist
from timm import utils
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from samon.errors import user_errors
from samon.settings.config import Config

URL = "samon://"


def restartable() -> bool:
    """Whether torchrun would start these processes again (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def run_id() -> str:
    """What torchrun calls this run in all of its attempts (--rdzv-id, random with --standalone); '' if nothing."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if restartable() and name != "none" else ""


def restart_count() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _living_processes(url: str, timeout: timedelta, **kwargs: object) -> Iterator[tuple[dist.Store, int, int]]:
    """`env://`, with a store that holds nothing of earlier attempts.

    torchrun's agent keeps one store over its restarts (seen in PyTorch 2.15), so a process may find the address of a
    dead one there and fail to connect. Every process writes a fresh word and the digest of all words it sees; once all
    digests agree, all words are of living processes, for the dead never saw them. The digest becomes the prefix.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set(f"samon/word/{rank}", uuid.uuid4().hex)
    words, digests = ([f"samon/{kind}/{r}" for r in range(size)] for kind in ("word", "digest"))
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        seen = [bytes(word) for word in store.multi_get(words)]
        digest = blake2b(b" ".join(seen), digest_size=8).hexdigest()
        store.set(f"samon/digest/{rank}", digest)
        if {bytes(other).decode() for other in store.multi_get(digests)} == {digest}:
            yield dist.PrefixStore(digest, store), rank, size
            return
        time.sleep(0.05)
    raise TimeoutError(f"{size} processes did not find together within {timeout}")


register_rendezvous_handler("samon", _living_processes)


@dataclass
class World:
    """This process among the others."""

    device: torch.device
    rank: int
    size: int

    @property
    def primary(self) -> bool:
        return self.rank == 0


def build_world(config: Config) -> World:
    """Start the processes' group (gloo or nccl by device) and seed this one as timm does."""
    for module in config.device_modules or []:
        with user_errors("--device-modules"):
            importlib.import_module(module)
    if config.device is None:
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    config.dist_url = URL if restartable() else None
    with user_errors("--device"):
        torch.device(config.device)
        device = utils.init_distributed_device(config)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    world = World(device, config.rank, config.world_size)
    utils.random_seed(config.seed, world.rank)
    return world


def shut_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
