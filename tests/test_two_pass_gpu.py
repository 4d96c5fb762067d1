"""What only a GPU can show; skipped without one."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

import samon

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]


OPTIONS = ({}, {"groups": 4}, {"bn_stats": "both", "same_noise": True}, {"perturb": "layer4"})


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["samon", "samon-layerl2", "sam-fisher", "sam-elemlinf"])
def test_no_host_synchronisation(name: str, options: dict) -> None:
    options = dict(options)
    if "groups" in options and not name.startswith("samon"):
        pytest.skip("groups are for scope samon")
    model = timm.create_model("resnet18", num_classes=5).cuda().train()
    opt = create_optimizer_v2(model, name, lr=0.1, perturb=options.pop("perturb", None))
    scaler = torch.amp.GradScaler("cuda")
    x, y = torch.randn(8, 3, 64, 64, device="cuda"), torch.randint(5, (8,), device="cuda")

    def forward() -> torch.Tensor:
        with torch.autocast("cuda", torch.float16):
            return F.cross_entropy(model(x), y)

    for _ in range(3):
        samon.two_pass(opt, forward, scaler=scaler, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        samon.two_pass(opt, forward, scaler=scaler, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None for p in model.parameters())


def test_gpu_gradient_equals_cpu() -> None:
    """float64 on both: only summation order differs."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=5).double().train()
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(5, (4,))
    grads = []
    for device in ("cpu", "cuda"):
        model.zero_grad()
        model.to(device)
        opt = create_optimizer_v2(model, "samon-layerl2", lr=0.1)
        samon.two_pass(opt, lambda device=device: F.cross_entropy(model(x.to(device)), y.to(device)), groups=2)
        grads.append([p.grad.cpu().clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
