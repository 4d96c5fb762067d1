"""The processes of a run: how they find each other, and which run they are a restart of."""

import argparse
import importlib
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm import utils
from timm.utils.distributed import is_distributed_env, world_info_from_env
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from samon.data.corrupt import DataError
from samon.errors import Stopped, UserError, reraise_as_user_error
from samon.progress import ConsoleHandler
from samon.trainer.config import Config

URL = "samon://"
PATIENCE = 5.0  # seconds of waiting for other processes without a word
LOGGERS = ("samon", "timm")
T = TypeVar("T")


def is_restartable() -> bool:
    """Whether torchrun would start these processes again (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def torchrun_id() -> str:
    """What torchrun calls this run in all of its attempts (--rdzv-id, random with --standalone); '' if nothing."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if is_restartable() and name != "none" else ""


def restart_id() -> str:
    """By what a restart knows its run: torchrun's name for it, or else the process that starts it again."""
    return (torchrun_id() or f"{socket.gethostname()}-{os.getppid()}") if is_restartable() else ""


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


@dataclass(frozen=True)
class DistInfo:
    """This process among the others."""

    device: torch.device
    rank: int
    size: int

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


def init_distributed(config: Config) -> DistInfo:
    """Start the processes' group (gloo or nccl by device), or find that there is one process."""
    for module in config.device_modules or []:
        with reraise_as_user_error("--device-modules"):
            importlib.import_module(module)
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = argparse.Namespace(device=name, dist_backend=None, dist_url=URL if is_restartable() else None)
    with reraise_as_user_error("--device"):
        torch.device(name)
    with _waiting():
        device = utils.init_distributed_device(settings)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return DistInfo(device, settings.rank, settings.world_size)


@contextmanager
def _waiting() -> Iterator[None]:
    """While the processes find each other: a line if that takes long, as it does when RANK is a leftover.

    Raises:
        UserError: they cannot.
    """
    with reraise_as_user_error("RANK, WORLD_SIZE"):
        several, (_, rank, size) = is_distributed_env(), world_info_from_env()
    with reraise_as_user_error("RANK, WORLD_SIZE" if several else "--device"):
        if not several:
            yield
            return
        host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        said = next(name for name in ("WORLD_SIZE", "SLURM_NTASKS") if name in os.environ)
        if not host or not port:
            what = (
                f"{said}={size} in the environment makes this one of {size} processes, without a MASTER_ADDR to meet at"
            )
            raise UserError(f"{what}; start them with torchrun, or unset {said} for a single process")
        text = f"process {rank} of {size}, waiting for the others at {host}:{port} (unset {said} for a single process)"
        timer = threading.Timer(PATIENCE, lambda: print(text, file=sys.stderr, flush=True))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def distributed_session(config: Config) -> Iterator[DistInfo]:
    """The entrance of every program: processes, log lines on stderr, and at the end the group's shutdown.

    After a fault, or one in the data, the group is left to the end of the process: shutting it down could wait for a
    process that is gone or still trains.
    """
    world = init_distributed(config)
    with console_logging(world):
        try:
            yield world
        except (Stopped, UserError) as error:
            if not isinstance(error, DataError):
                shutdown()
            raise
    shutdown()


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def console_logging(world: DistInfo) -> Iterator[None]:
    """Log lines on stderr: all of rank 0's, warnings of the others."""
    handler = ConsoleHandler(sys.stderr)
    handler.setLevel(logging.INFO if world.is_rank_zero else logging.WARNING)
    logging.getLogger("samon").setLevel(logging.INFO)
    logging.getLogger("timm").setLevel(logging.WARNING)
    with log_handler(handler):
        yield


@contextmanager
def log_handler(handler: logging.Handler) -> Iterator[None]:
    """What this project and timm log goes to the handler inside."""
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)


def rank_zero_only(world: DistInfo, function: Callable[[], T]) -> T:
    """`function()` of rank 0 on every process, errors of users and files included, so that all of them end alike."""
    if world.size == 1:
        return function()
    answer: list[Any] = [None, None]
    if world.is_rank_zero:
        try:
            answer[0] = function()
        except (UserError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, device=world.device if world.device.type == "cuda" else None)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
