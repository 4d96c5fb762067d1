"""SAM-ON with Accelerate: python examples/accelerate_loop.py (or torchrun --standalone --nproc-per-node 2 ...)

`two_pass` runs both backward passes and replaces `accelerator.backward`; the rest is standard Accelerate. With several
processes each perturbs the weights by its own batch, and the gradients are averaged once per step.
"""

from functools import partial

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from fashion import accuracy, batches, small_resnet

import samon


def main(epochs: int = 3, samples: int | None = None) -> float:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model = small_resnet()
    optimizer = timm.optim.create_optimizer_v2(model, "samon-layerl2", lr=0.05, momentum=0.9, rho=0.05)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches("train", samples=samples))

    def loss_fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():
            return F.cross_entropy(model(x), y)

    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            samon.two_pass(optimizer, partial(loss_fn, x, y), no_sync=partial(accelerator.no_sync, model))
            optimizer.step()
    top1 = accuracy(accelerator.unwrap_model(model).cpu())
    accelerator.print(f"test accuracy {top1:.1f} %")  # of the main process, which has its own BatchNorm statistics
    return top1


if __name__ == "__main__":
    main()
