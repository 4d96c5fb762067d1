"""Memory and messages of the code that runs inside a context, counted from its (real or fake) tensors."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samon.sam import to_local

PARAMETERS, GATHERED, GRADIENTS, OPTIMIZER, REST = "parameters", "gathered", "gradients", "optimizer", "activations"
KINDS = (PARAMETERS, GATHERED, GRADIENTS, OPTIMIZER, REST)
Args = tuple[object, ...]
# Name, and how often a process sends (n - 1) / n of the full buffer in a ring.
COLLECTIVES = {
    "allgather": ("all-gather", 1),
    "reduce_scatter": ("reduce-scatter", 1),
    "allreduce": ("all-reduce", 2),
    "broadcast": ("broadcast", 1),
}


class CostTracker(TorchDispatchMode):
    """Counts the bytes of live storages by kind, and those of messages by collective.

    Attributes:
        now, peak: bytes by kind; `peak` when their sum was largest.
        buffers, wire: bytes of the messages' buffers, bytes that a process sends in a ring.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = Counter[str](), Counter[str]()
        self.buffers, self.wire = Counter[str](), Counter[str]()
        self._live: dict[int, tuple[str, int, weakref.ref[torch.UntypedStorage]]] = {}

    def add(self, tensors: Iterable[object], kind: str) -> None:
        """Count the tensors among these as `kind` from now on."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._count(to_local(tensor).untyped_storage(), kind)

    @contextmanager
    def track_gradients(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """Count what is accumulated into `.grad` of these parameters as gradients."""
        handles = [p.register_post_accumulate_grad_hook(lambda q: self.add([q.grad], GRADIENTS)) for p in parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __enter__(self) -> "CostTracker":
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage._cdata in self._live:  # FSDP allocates and frees gathered parameters in this way
                self._count(storage, GATHERED)

        self._patch = patch.object(torch.UntypedStorage, "resize_", resize_and_count)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patch.stop()

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: dict[str, object] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("c10d.").lstrip("_")
        collective = next((key for key in COLLECTIVES if name.startswith(key)), None) if "c10d." in str(func) else None
        if collective is not None:
            self._count_message(collective, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):  # a DTensor has no storage of its own
                self._count(tensor.untyped_storage(), None)
        if collective == "reduce_scatter":  # FSDP keeps the sharded gradients there
            self.add(tree_leaves(args[0]), GRADIENTS)
        return out

    def _count_message(self, collective: str, args: Args) -> None:
        name, passes = COLLECTIVES[collective]
        size = max(sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args[:2])
        scripts = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
        ranks = ProcessGroup.unbox(scripts[0]).size() if scripts else 1
        self.buffers[name] += size
        self.wire[name] += passes * size * (ranks - 1) // ranks

    def _count(self, storage: torch.UntypedStorage, kind: str | None) -> None:
        """Count a storage; its kind stays the same if None."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            old_kind, old_size, reference = self._live[key]
            kind = kind or old_kind
            if (kind, size) == (old_kind, old_size):
                return
            self.now[old_kind] -= old_size
        else:
            kind, reference = kind or REST, weakref.ref(storage, lambda _: self._drop(key))
        self._live[key] = (kind, size, reference)
        self.now[kind] += size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def _drop(self, key: int) -> None:
        if key in self._live:
            kind, size, _ = self._live.pop(key)
            self.now[kind] -= size
