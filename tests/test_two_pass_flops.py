"""What a step costs, in exact operation counts on the meta device, over a plain forward and backward."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch.utils.flop_counter import FlopCounterMode

import samon


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def ratio(model_name: str, opt_name: str, groups: int = 1, perturb: str | None = None, replay: bool = True) -> float:
    with torch.device("meta"):
        model = timm.create_model(model_name).train()
        x, y = torch.empty(8, 3, 224, 224), torch.empty(8, dtype=torch.long)
    opt = create_optimizer_v2(model, opt_name, lr=0.1, perturb=perturb)

    def forward() -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    samon.two_pass(opt, forward, groups=groups, replay=replay)  # the first step may record a replay plan
    plain = count(lambda: forward().backward())
    return count(lambda: samon.two_pass(opt, forward, groups=groups, replay=replay)) / plain


LAST_THIRD = r"blocks\.(8|9|10|11)\.|^norm"


@pytest.mark.parametrize(
    ("model", "opt", "options", "bound"),
    [
        ("resnet50", "sam", {}, 2.00),
        ("resnet50", "samon", {}, 1.67),
        ("resnet50", "samon-layerl2", {"groups": 8}, 1.70),
        ("resnet50", "samon", {"perturb": "layer4"}, 1.13),
        ("resnet50", "samon", {"perturb": "layer4", "replay": False}, 1.39),
        ("vit_small_patch32_224", "sam", {}, 2.00),
        ("vit_small_patch32_224", "samon", {}, 1.67),
        ("vit_small_patch32_224", "samon", {"groups": 8}, 1.70),
        ("vit_small_patch32_224", "samon", {"perturb": LAST_THIRD}, 1.24),
    ],
)
def test_cost(model: str, opt: str, options: dict, bound: float) -> None:
    assert bound - 0.05 < ratio(model, opt, **options) <= bound
