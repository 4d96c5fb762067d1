"""The processes of a run: how they find each other, what they log, and how a restart by torchrun is recognized."""

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

RESTART_URL = "samon://"
NOTICE_DELAY = 5.0  # seconds of waiting for other processes before a line says so
T = TypeVar("T")


@dataclass(frozen=True)
class DistInfo:
    """This process among all processes."""

    device: torch.device
    rank: int
    size: int

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


# --- restarts by torchrun ---------------------------------------------------------------------------------------------


def is_restartable() -> bool:
    """Whether torchrun would restart these processes (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def torchrun_id() -> str:
    """torchrun's name of this run in all of its attempts (--rdzv-id, random with --standalone), '' if there is none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if is_restartable() and name != "none" else ""


def restart_id() -> str:
    """What a restart recognizes its run by: torchrun's name of it, or the process that restarts it."""
    return (torchrun_id() or f"{socket.gethostname()}-{os.getppid()}") if is_restartable() else ""


def _rendezvous_without_dead(url: str, timeout: timedelta, **kwargs: object) -> Iterator[tuple[dist.Store, int, int]]:
    """`env://` with a store that is empty after a restart.

    torchrun's agent keeps one store over its restarts (seen in PyTorch 2.15), so a process may find the address of a
    dead one there and fail to connect. Therefore every process writes a fresh id and the digest of all ids it sees.
    Once all digests agree, all ids are of living processes (the dead never saw them); the digest becomes the prefix.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set(f"samon/word/{rank}", uuid.uuid4().hex)
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        ids = [bytes(text) for text in store.multi_get([f"samon/word/{r}" for r in range(size)])]
        digest = blake2b(b" ".join(ids), digest_size=8).hexdigest()
        store.set(f"samon/digest/{rank}", digest)
        if {bytes(text).decode() for text in store.multi_get([f"samon/digest/{r}" for r in range(size)])} == {digest}:
            yield dist.PrefixStore(digest, store), rank, size
            return
        time.sleep(0.05)
    raise TimeoutError(f"{size} processes did not find each other within {timeout}")


register_rendezvous_handler("samon", _rendezvous_without_dead)

# --- the process group ------------------------------------------------------------------------------------------------


@contextmanager
def distributed_session(config: Config) -> Iterator[DistInfo]:
    """Start the process group, log to stderr, and shut the group down at the end.

    After a fault, or an error in the data, the group is left to the end of the process: shutting it down could wait for
    a process that is gone or still trains.
    """
    dist_info = init_distributed(config)
    with console_logging(dist_info):
        try:
            yield dist_info
        except (Stopped, UserError) as error:
            if dist.is_initialized() and not isinstance(error, DataError):
                dist.destroy_process_group()
            raise
    if dist.is_initialized():
        dist.destroy_process_group()


def init_distributed(config: Config) -> DistInfo:
    """Start the process group (gloo or NCCL, by device) unless there is only one process."""
    for module in config.device_modules or []:
        with reraise_as_user_error("--device-modules"):
            importlib.import_module(module)
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args = argparse.Namespace(device=name, dist_backend=None, dist_url=RESTART_URL if is_restartable() else None)
    with reraise_as_user_error("--device"):
        torch.device(name)
    with reraise_as_user_error("RANK, WORLD_SIZE"):
        distributed, (_, rank, size) = is_distributed_env(), world_info_from_env()
    with reraise_as_user_error("RANK, WORLD_SIZE" if distributed else "--device"):
        notice = _announce_wait(rank, size) if distributed else None
        try:
            device = utils.init_distributed_device(args)
        finally:
            if notice is not None:
                notice.cancel()
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return DistInfo(device, args.rank, args.world_size)


def _announce_wait(rank: int, size: int) -> threading.Timer:
    """Print a line if the other processes do not come soon, as when RANK is a leftover in the environment."""
    host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    variable = next(name for name in ("WORLD_SIZE", "SLURM_NTASKS") if name in os.environ)
    if not host or not port:
        raise UserError(
            f"{variable}={size} in the environment makes this one of {size} processes, but there is no MASTER_ADDR to "
            f"meet at; start them with torchrun, or unset {variable} for a single process"
        )
    text = f"process {rank} of {size}, waiting for the others at {host}:{port} (unset {variable} for a single process)"
    timer = threading.Timer(NOTICE_DELAY, lambda: print(text, file=sys.stderr, flush=True))
    timer.start()
    return timer


def gloo_group() -> dist.ProcessGroup | None:
    """A new group of all processes that communicates on the CPU, beside the device's; None for a single process."""
    group: Any = dist.new_group(backend="gloo") if dist.is_initialized() else None
    return group


def rank_zero_only(dist_info: DistInfo, function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result on every process; its UserError or OSError is raised on all."""
    if dist_info.size == 1:
        return function()
    answer: list[Any] = [None, None]
    if dist_info.is_rank_zero:
        try:
            answer[0] = function()
        except (UserError, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, device=dist_info.device if dist_info.device.type == "cuda" else None)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


# --- logging ----------------------------------------------------------------------------------------------------------


@contextmanager
def console_logging(dist_info: DistInfo) -> Iterator[None]:
    """Log to stderr: everything of rank 0, warnings of the others."""
    handler = ConsoleHandler(sys.stderr)
    handler.setLevel(logging.INFO if dist_info.is_rank_zero else logging.WARNING)
    logging.getLogger("samon").setLevel(logging.INFO)
    logging.getLogger("timm").setLevel(logging.WARNING)
    with log_handler(handler):
        yield


@contextmanager
def log_handler(handler: logging.Handler) -> Iterator[None]:
    """Temporarily send what this package and timm log to the handler."""
    loggers = [logging.getLogger(name) for name in ("samon", "timm")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
