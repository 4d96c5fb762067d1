"""SAM-ON with Lightning: python examples/lightning_module.py

Automatic optimization calls `optimizer.step(closure)`, so only the optimizer's name changes. The closure computes full
gradients in both passes (a step costs 2.00 plain ones, not 1.66); under DDP it also averages the ascent gradient.
`accumulate_grad_batches` is refused: set `automatic_optimization = False` and call `samon.two_pass` per micro-batch.
"""

from typing import Any

import lightning
import timm
import torch
import torch.nn.functional as F
from fashion import accuracy, batches, small_resnet

import samon  # noqa: F401  registers the optimizers with timm


class Classifier(lightning.LightningModule):
    def __init__(self, opt: str = "samon-layerl2", **options: Any) -> None:
        super().__init__()
        self.model = small_resnet()
        self.opt, self.options = opt, options

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return timm.optim.create_optimizer_v2(self.model, self.opt, lr=0.05, momentum=0.9, **self.options)


def main(epochs: int = 3, samples: int | None = None) -> float:
    module = Classifier(rho=0.05)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches("train", samples=samples))
    return accuracy(module.model)


if __name__ == "__main__":
    print(f"test accuracy {main():.1f} %")
