"""FLOPs of a step: `python -m experiments.translation.flops -c experiments/translation/iwslt14.yaml`.

Those of matrix products in forward and backward, relative to a plain step, counted on the meta device.
"""

import argparse
import json
from functools import partial

import torch

import samon
from experiments.translation.model import Translator, token_loss
from experiments.translation.settings import Settings, load_settings
from experiments.translation.train import make_optimizer
from samon.cli.program import run_script
from samon.trainer.flops import count_flops


def step_flops(settings: Settings, length: int) -> int:
    """FLOPs of a step of the settings' optimizer, on a batch of `max_tokens` in sentences of `length` tokens."""
    shape = (max(1, settings.max_tokens // length), length)
    with torch.device("meta"):
        model = Translator(settings, settings.vocabulary).train()
        pieces = torch.empty(shape, dtype=torch.long)
        forward = partial(token_loss, model, pieces, pieces, pieces, settings.smoothing)
        optimizer = make_optimizer(model, settings)
        if samon.is_sam_name(settings.opt):
            return count_flops(lambda: samon.two_pass(optimizer, forward))
        return count_flops(lambda: forward().backward())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", metavar="FILE")
    parser.add_argument("--length", type=int, default=25, help="tokens per sentence")
    options = parser.parse_args(arguments)

    def flops(opt: str) -> int:
        return step_flops(load_settings(options.config, {"opt": opt}), options.length)

    plain = flops("adamw")
    print(json.dumps({opt: round(flops(opt) / plain, 3) for opt in ("sam-adamw", "samon-adamw")}))


if __name__ == "__main__":
    run_script(main)
