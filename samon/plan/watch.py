"""Memory and messages of whatever runs inside, counted from its tensors: real ones, or fake ones that hold no data."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samon.sam import to_local

PARAMETERS, GATHERED, GRADIENTS, OPTIMIZER, REST = "parameters", "gathered", "gradients", "optimizer", "activations"
KINDS = (PARAMETERS, GATHERED, GRADIENTS, OPTIMIZER, REST)
# Of each collective: the buffer that is as large as what all processes have together, and how often (n - 1) / n of it
# a process sends in a ring.
COLLECTIVES = {
    "allgather": ("all-gather", 1),
    "reduce_scatter": ("reduce-scatter", 1),
    "allreduce": ("all-reduce", 2),
    "broadcast": ("broadcast", 1),
}


class Watch(TorchDispatchMode):
    """Counts storages that are alive, by kind, and messages.

    Attributes:
        now, peak: bytes by kind; `peak` when their sum was largest.
        buffers, wire: bytes by collective: the buffers it works on, and what a process sends of them in a ring.
        messages: how many of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = Counter[str](), Counter[str]()
        self.buffers, self.wire, self.messages = Counter[str](), Counter[str](), Counter[str]()
        self._live: dict[int, tuple[str, int, Any]] = {}
        self._largest = 0

    def hold(self, tensors: Iterable[Any], kind: str) -> None:
        """These tensors are there, and of this kind."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._note(to_local(tensor).untyped_storage(), kind)

    def watch_gradients(self, parameters: Iterable[Tensor]) -> ExitStack:
        """While it is open, what is accumulated for these parameters counts as gradients."""
        stack = ExitStack()
        for p in parameters:
            handle = p.register_post_accumulate_grad_hook(lambda q: self.hold([q.grad], GRADIENTS))
            stack.callback(handle.remove)
        return stack

    def __enter__(self) -> "Watch":
        self._patched = _resizes(self)
        self._patched.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patched.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        scattered = False
        if name.startswith("c10d."):
            scattered = self._message(name, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):  # a DTensor's own storage is none
                self._note(tensor.untyped_storage(), None)
        if scattered:  # FSDP keeps the sharded gradients there
            self.hold(tree_leaves(args[0]), GRADIENTS)
        return out

    def _message(self, name: str, args: Any) -> bool:
        kind = next((key for key in COLLECTIVES if name.removeprefix("c10d.").lstrip("_").startswith(key)), None)
        if kind is None:
            return False
        label, passes = COLLECTIVES[kind]
        sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args[:2]]
        groups = [ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg)]
        ranks = groups[0].size() if groups else 1
        self.messages[label] += 1
        self.buffers[label] += max(sizes)
        self.wire[label] += passes * max(sizes) * (ranks - 1) // ranks
        return kind == "reduce_scatter"

    def _note(self, storage: Any, kind: str | None) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            before, old, reference = self._live[key]
            if before == (kind or before) and old == size:
                return
            self.now[before] -= old
            kind = kind or before
        else:
            kind, reference = kind or REST, weakref.ref(storage, lambda _: self._drop(key))
        self._live[key] = (kind, size, reference)
        self.now[kind] += size
        total = self.now.total()
        if total > self._largest:
            self._largest, self.peak = total, self.now.copy()

    def _drop(self, key: int) -> None:
        kind, size, _ = self._live.pop(key, (REST, 0, None))
        self.now[kind] -= size

    def resized(self, storage: Any) -> None:
        """FSDP makes room for gathered parameters, and frees it, by resizing their storage."""
        if storage._cdata in self._live:
            self._note(storage, GATHERED)


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


@contextmanager
def _resizes(watch: Watch) -> Iterator[None]:
    plain = torch.UntypedStorage.resize_

    def resize(storage: Any, size: int) -> None:
        plain(storage, size)
        watch.resized(storage)

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
