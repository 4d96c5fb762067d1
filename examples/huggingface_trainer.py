"""SAM-ON with the Hugging Face Trainer: python examples/huggingface_trainer.py

`SAMTrainer.training_step` runs both passes in place of one backward. The Trainer still accumulates micro-batches
(`gradient_accumulation_steps`: each has its own perturbation), clips, schedules and steps. DeepSpeed is not supported.
"""

import tempfile
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from fashion import accuracy, batches, small_resnet
from transformers import Trainer, TrainingArguments

import samon


class SAMTrainer(Trainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)

        def forward() -> torch.Tensor:
            with self.compute_loss_context_manager():
                loss: Any = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            return loss

        # As in the Trainer: a loss divided by the number of items in all micro-batches is not divided by their number.
        per_item = num_items_in_batch is not None and self.model_accepts_loss_kwargs
        scale = 1.0 if per_item or self.compute_loss_func else 1 / self.current_gradient_accumulation_steps
        no_sync, scaler = partial(self.accelerator.no_sync, model), self.accelerator.scaler
        return scale * samon.two_pass(self.optimizer, forward, loss_scale=scale, no_sync=no_sync, scaler=scaler)


class Classifier(torch.nn.Module):
    """A model as the Trainer calls it: with the entries of a batch, to return the loss and the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_resnet()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.model(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def make_trainer(model: torch.nn.Module, data: Any, output: str, opt: str = "samon-layerl2", **args: Any) -> SAMTrainer:
    quiet: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    settings = TrainingArguments(output, use_cpu=not torch.cuda.is_available(), **quiet, **args)
    optimizer = timm.optim.create_optimizer_v2(model, opt, lr=0.05, momentum=0.9, rho=0.05)
    return SAMTrainer(model, settings, train_dataset=data, optimizers=(optimizer, None))


def main(epochs: int = 3, samples: int | None = None) -> float:
    model = Classifier()
    data = [{"x": x, "labels": y} for x, y in batches("train", samples=samples).dataset]
    with tempfile.TemporaryDirectory() as output:
        args: dict[str, Any] = {"per_device_train_batch_size": 25, "gradient_accumulation_steps": 2}
        make_trainer(model, data, output, num_train_epochs=epochs, **args).train()
    return accuracy(model.model.cpu())


if __name__ == "__main__":
    print(f"test accuracy {main():.1f} %")
