"""Real processes for distributed tests.

`run_ranks(function, n)` runs `function(rank, *args)` on n gloo ranks; `launch(main, n, *args)` does what torchrun does.
"""

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tools.check_interruptions import CONTEXT as context
from tools.check_interruptions import free_port


def _rank(function: Callable, rank: int, world: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        torch.save(function(rank, *args), f"{folder}/{rank}.pt")
    except BaseException:
        Path(f"{folder}/{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # without waiting for peers that hang in a collective
    dist.barrier()
    dist.destroy_process_group()


def run_all(processes: list[Any], timeout: float) -> None:
    """Start the processes and wait; those that have not ended then are killed."""
    for p in processes:
        p.start()
    for p in processes:
        p.join(timeout)
    for p in processes:
        if p.is_alive():
            p.kill()


def run_ranks(function: Callable, world: int = 2, *args: Any, timeout: float = 120) -> list[Any]:
    """What `function` returned on each rank. It must be importable, and its result a tree of tensors and numbers."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(function, r, world, folder, args)) for r in range(world)]
        run_all(processes, timeout)
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, errors[0]
        assert all(p.exitcode == 0 for p in processes), f"exit codes {[p.exitcode for p in processes]}"
        return [torch.load(f"{folder}/{r}.pt", weights_only=True) for r in range(world)]


def _launched(function: Callable, rank: int, world: int, port: int, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    function(*args)


def launch(function: Callable, world: int, *args: Any, timeout: float = 120) -> None:
    """Call `function(*args)` in processes with the environment that torchrun would give them."""
    port = free_port()
    processes = [context.Process(target=_launched, args=(function, r, world, port, args)) for r in range(world)]
    run_all(processes, timeout)
    assert all(p.exitcode == 0 for p in processes), f"exit codes {[p.exitcode for p in processes]}"
