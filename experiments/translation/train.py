"""Train a German-English Transformer: `python -m experiments.translation.train -c experiments/translation/django.yaml`.

A single process on the CPU or on one GPU. Writes `last.pt` (to resume from) and `best.pt` (by validation BLEU) into
--output after an epoch, and a line of JSON for each epoch into `log.jsonl`.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
from timm.optim import create_optimizer_v2
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

import samon
from experiments.translation.data import Batch, Corpus, collate, encode, load_corpus, token_batches, train_bpe
from experiments.translation.evaluate import bleu, device_of_choice, read_checkpoint, translate
from experiments.translation.model import Translator, token_loss
from experiments.translation.settings import Settings, load_settings
from experiments.translation.step import fill_gradients, inverse_sqrt
from samon import UserError, rng
from samon.cli.program import run_script
from samon.errors import RunError, reraise_as_user_error
from samon.files import atomic_write


class Run:
    """A training run: its state and its position.

    Attributes:
        epoch: epochs done.
        updates: updates done in total.
        best: the best validation BLEU so far.
    """

    def __init__(self, settings: Settings, directory: Path, corpus: Corpus, bpe: bytes):
        self.settings, self.directory, self.corpus, self.bpe = settings, directory, corpus, bpe
        self.processor = spm.SentencePieceProcessor(model_proto=bpe)
        pairs = encode(self.processor, corpus.train)
        self.pairs = [p for p in pairs if max(map(len, p)) <= settings.max_length and all(p)]
        self.device = device_of_choice()
        torch.manual_seed(settings.seed)
        with reraise_as_user_error("model"):
            self.model = Translator(settings, self.processor.get_piece_size()).to(self.device)
        self.optimizer = make_optimizer(self.model, settings)
        self.epoch, self.updates, self.best = 0, 0, -1.0

    def train(self) -> None:
        """Train from the current epoch to the end."""
        s = self.settings
        while self.epoch < s.epochs:
            began, loss, count = time.perf_counter(), 0.0, 0
            batches = token_batches(self.pairs, s.max_tokens, seed=s.seed * 100_003 + self.epoch)
            for i in range(0, len(batches), s.accumulate):
                micro_batches = [collate([self.pairs[k] for k in batch]) for batch in batches[i : i + s.accumulate]]
                tokens = sum(batch.tokens for batch in micro_batches)
                loss, count = loss + self.update(micro_batches) * tokens, count + tokens
            self.end_epoch(loss / count, time.perf_counter() - began)

    def update(self, batches: list[Batch]) -> float:
        """Do one update and return its loss."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = inverse_sqrt(self.updates, s.lr, s.warmup)
        self.model.train()
        self.optimizer.zero_grad()
        losses = [partial(self.loss, batch) for batch in batches]
        loss = float(fill_gradients(self.optimizer, losses, [batch.tokens for batch in batches], s.m_sharpness))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not math.isfinite(loss + float(torch.nn.utils.get_total_norm(gradients))):  # before it reaches the weights
            fault = f"loss {loss} or its gradient is not finite at update {self.updates}"
            raise RunError(f"{fault}; train with less lr or rho")
        self.optimizer.step()
        self.updates += 1
        return loss

    def loss(self, batch: Batch) -> torch.Tensor:
        source, shifted, target = (t.to(self.device) for t in (batch.source, batch.shifted, batch.target))
        with self.arithmetic():
            return token_loss(self.model, source, shifted, target, self.settings.smoothing)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Autocast if the settings say so. On the CPU, attention uses plain matrix products: for short sequences the
        backward of torch's fused kernel is several times slower in bfloat16."""
        cpu = self.device.type == "cpu"
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bfloat16),
            sdpa_kernel(SDPBackend.MATH) if cpu else nullcontext(),
        ):
            yield

    def end_epoch(self, loss: float, seconds: float) -> None:
        """Validate, save and log."""
        line = {"epoch": self.epoch, "updates": self.updates, "loss": loss, "seconds": round(seconds, 1)}
        self.epoch += 1
        if self.epoch % self.settings.valid_every == 0 or self.epoch == self.settings.epochs:
            # Greedy: a beam costs several times as much.
            sources = [german for german, _ in self.corpus.valid]
            line["valid_bleu"] = bleu(translate(self.model, self.processor, sources, beam=1), self.corpus.valid).score
            if line["valid_bleu"] > self.best:
                self.best = line["valid_bleu"]
                self.save("best.pt")
        self.save("last.pt")
        print(json.dumps(line), flush=True)
        with open(self.directory / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def save(self, name: str) -> None:
        """Save the whole state, as tensors and plain types only, so that `weights_only=True` can load it."""
        content = {
            "settings": asdict(self.settings),
            "bpe": torch.frombuffer(bytearray(self.bpe), dtype=torch.uint8),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": [self.epoch, self.updates, self.best],
            "random": rng.get_torch_state(self.device),
        }
        with atomic_write(self.directory / name) as file:
            torch.save(content, file)


def make_optimizer(model: Translator, s: Settings) -> Optimizer:
    """Create timm's optimizer of that name. All parameters decay, norms and biases included, as with fairseq's Adam."""
    if s.rho and not samon.is_sam_name(s.opt):
        fault = f"rho is for samon's optimizers, and {s.opt} is not one"
        raise UserError(f"{fault}; leave rho out or use --opt samon-adamw")
    options: dict[str, Any] = {"lr": s.lr, "weight_decay": s.weight_decay, "betas": (0.9, s.beta2)}
    options |= {"rho": s.rho} if s.rho else {}
    with reraise_as_user_error(f"--opt {s.opt}"):
        return create_optimizer_v2(model, s.opt, filter_bias_and_bn=False, **options)


def begin(settings: Settings, directory: Path) -> Run:
    """Start a new run in a directory without one."""
    if (directory / "last.pt").exists():
        raise UserError(f"{directory} already holds a run; use --resume {directory} or another --output")
    corpus = load_corpus(settings)
    bpe = train_bpe(corpus.train, settings.vocabulary)
    directory.mkdir(parents=True, exist_ok=True)
    return Run(settings, directory, corpus, bpe)


def resume(directory: Path, epochs: int | None = None) -> Run:
    """Load a run and its settings from its last checkpoint; `epochs` changes its number of epochs.

    The learning rate does not depend on the number of epochs, so an extended run equals one planned at that length.
    """
    settings, bpe, content = read_checkpoint(directory / "last.pt")
    settings = settings if epochs is None else replace(settings, epochs=epochs)
    run = Run(settings, directory, load_corpus(settings), bpe)
    run.model.load_state_dict(content["model"])
    run.optimizer.load_state_dict(content["optimizer"])
    run.epoch, run.updates, run.best = content["progress"]
    rng.set_torch_state(content["random"], run.device)
    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", metavar="FILE", help="recipe, iwslt14.yaml or django.yaml")
    parser.add_argument("--text", metavar="DIR", help="train.de, train.en, valid.*, test.*")
    parser.add_argument("--opt", help="adamw, sam-adamw, samon-adamw or another of timm's")
    parser.add_argument("--rho", type=float)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", metavar="DIR", default="output/translation/run")
    parser.add_argument("--resume", metavar="DIR", help="resume this run with its settings; --epochs extends it")
    options = vars(parser.parse_args(arguments))
    recipe, output, resumed = (options.pop(name) for name in ("config", "output", "resume"))
    if resumed is not None:
        epochs = options.pop("epochs")
        if recipe is not None or any(v is not None for v in options.values()):
            raise UserError("--resume uses the settings of the run; only --epochs can be changed")
        run = resume(Path(resumed), epochs)
    else:
        run = begin(load_settings(recipe, options), Path(output))
    counts = {name: len(getattr(run.corpus, name)) for name in ("train", "valid", "test")}
    parameters = sum(p.numel() for p in run.model.parameters())
    print(json.dumps({"pairs": counts, "parameters": parameters, "opt": run.settings.opt}), flush=True)
    run.train()


if __name__ == "__main__":
    run_script(main)
