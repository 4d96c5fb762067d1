"""CUDA graphs without a GPU: a backend whose graphs write their outputs into the same memory at every run, and which
spoils all of that memory when a new run is announced, as a replay does."""

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd


class Pool:
    """The memory that all graphs share."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.runs = 0

    @property
    def backend(self) -> Any:
        return aot_autograd(fw_compiler=self.captured, bw_compiler=self.captured)

    def begin(self) -> None:
        self.runs += 1
        for tensor in self.tensors:
            tensor.fill_(torch.nan)

    def captured(self, graph, inputs) -> Callable:
        own: dict[int, Tensor] = {}

        def run(*args: Tensor) -> list[Tensor | None]:
            given = {a.data_ptr() for a in args if isinstance(a, Tensor)}
            results: list[Tensor | None] = []
            for i, result in enumerate(graph(*args)):
                if isinstance(result, Tensor) and result.is_floating_point() and result.data_ptr() not in given:
                    if i not in own:
                        own[i] = torch.empty_like(result)
                        self.tensors.append(own[i])
                    result = own[i].copy_(result).detach()
                results.append(result)
            return results

        return make_boxed_func(run)
