"""The optimizer's step: skipped on the device without a read on the host, bit for bit as the host would skip it."""

from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

import samon
from samon.registry import VARIANTS
from samon.trainer.apply import apply_gradient, step_if
from samon.trainer.build import Task
from samon.trainer.distributed import DistInfo
from samon.trainer.flags import Settings
from samon.trainer.gradient import compute_gradient
from samon.trainer.loop import to_device
from samon.trainer.meter import Meter
from tests.nets import BatchNormNet, LayerNormNet, batch, randomized
from tests.runs import built
from tests.steps import same


def run_of(model: nn.Module, optimizer: Any, device: str, scaler: Any = None) -> Any:
    """A run that steps as it does on this device, wherever the model is."""
    config, task = SimpleNamespace(clip_grad=1.0, clip_mode="norm", fsdp=False), Task(model, nn.CrossEntropyLoss())
    dist_info = DistInfo(torch.device(device), 0, 1)
    return SimpleNamespace(task=task, optimizer=optimizer, scaler=scaler, config=config, dist_info=dist_info)


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


OPTIMIZERS: dict[str, Settings] = {
    **{name: {} for name in ("sgd", "samon-momentum", "samon-adamw", "samon-lion", "lookahead_samon", "sam-random")},
    "sam-layerl2": {"base_opt": "rmsprop"},
    "adamw": {"fused": True},
    "samon": {"base_opt": "adamw", "fused": True},
    "samon-adamw previous": {"ascent": "previous"},
    "samon momentum": {"ascent": "momentum"},
    "samon friendly": {"ascent": "friendly"},
    "sam-momentum every": {"ascent": "every:1"},
    "samon adaptive": {"ascent": "adaptive"},
    "ssam-f": {"mask_every": 2},
    "ssam-d": {"mask_every": 2},
    "lookahead_ssam-f": {"mask_every": 1},
    "lookahead_samon friendly": {"ascent": "friendly"},
    "sam-adamw gsam": {"gsam_alpha": 0.3},
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_that_is_not_finite_changes_nothing(name: str, scaled: bool) -> None:
    """Whether the host or the device skips the updates with a NaN image, the training ends with the bits of one that
    had none of them, masks and ascents included."""
    ends = []
    for skipped, device in (((), "cpu"), ((0, 2, 3), "cpu"), ((0, 2, 3), "cuda")):
        torch.manual_seed(0)
        model = randomized(LayerNormNet())
        opt = create_optimizer_v2(model, name.split()[0], **{"lr": 0.01, "weight_decay": 0.01} | OPTIMIZERS[name])
        sam = samon.sam_of(opt)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) if scaled else None
        run = run_of(model, opt, device, scaler)
        for t in range(6):
            for bad in [True, False] if t in skipped else [False]:
                x, y = batch(8, seed=t)
                x[0] *= torch.nan if bad else 1
                opt.zero_grad()
                forward = partial(loss_of, model, x, y)
                if sam is not None:
                    samon.two_pass(opt, forward, scaler=scaler)
                else:
                    loss = forward()
                    (loss if scaler is None else scaler.scale(loss)).backward()
                assert bool(apply_gradient(run)[1]) != bad
        if sam is not None and sam.mask is not None:
            assert sam.mask.step == 6 or name == "sam-random"  # where the count means nothing
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(p.isfinite().all() for p in ends[0])
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))


@pytest.mark.parametrize(
    ("mode", "value", "opt"),
    [
        *(("norm", 0.01, opt) for opt in ("sgd", "samon --gsam-alpha 0.5", "samon --ascent looksam:2")),
        ("norm", 0.01, "samon --ascent aesam"),
        ("value", 0.001, "sgd"),
        ("agc", 0.01, "sgd"),
    ],
)
def test_clipping(mode: str, value: float, opt: str) -> None:
    """Of what is applied: GSAM and LookSAM change the gradient before. AE-SAM measures it before."""
    run = built("--clip-grad", str(value), "--clip-mode", mode, "--opt", *opt.split())
    for images, target in islice(run.train_loader, 2):
        compute_gradient(run, iter([to_device(run, images, target)]), 1, perturb=run.sam is not None)
        before = {name: p.grad.clone() for name, p in run.model.named_parameters()}
        apply_gradient(run)
    grads = {name: p.grad for name, p in run.model.named_parameters()}
    if mode == "norm":
        assert torch.nn.utils.get_total_norm(list(grads.values())) == pytest.approx(value, rel=1e-3)
        assert "aesam" not in opt or run.sam.ascent.moments[0] > 100 * value**2
    elif mode == "value":
        assert max(g.abs().max() for g in grads.values()) == pytest.approx(value)
    else:
        changed = {name for name, g in grads.items() if not torch.equal(g, before[name])}
        assert changed
        assert not changed & {"fc.weight", "fc.bias"}  # timm leaves the head out


BASED = ("-momentum", "-adamw", "-lion", "-muon")
SHARP = ("sgd", "adamw", "lion", "muon", "lamb", "kron")  # a wrapper shares state and groups with its base
PLAIN = [n for n in list_optimizers(exclude_filters=["fused*", "bnb*", "adahessian"]) if not samon.is_sam_name(n)]


@pytest.mark.filterwarnings("ignore")  # some bases use what torch has deprecated
@pytest.mark.parametrize(("base", "sharp"), [*((base, False) for base in PLAIN), *((base, True) for base in SHARP)])
def test_a_skipped_update_leaves_no_trace(base: str, sharp: bool) -> None:
    """Before the first one, between, and for a layer whose gradients begin later: all that is kept has the same bits
    as if it had never been."""
    ends = []
    for skipped in ((), (0, 1, 3, 5)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
        opt = create_optimizer_v2(model, "sam" if sharp else base, lr=0.01, **({"base_opt": base} if sharp else {}))
        for t in range(6):
            for bad in [True, False] if t in skipped else [False]:
                torch.manual_seed(t)  # kron draws from it
                for p in model.parameters() if t > 2 else model[2].parameters():
                    p.grad = torch.full_like(p, torch.nan) if bad else torch.randn(p.shape)
                if sharp:
                    opt.expect_plain_step()
                with torch.compiler.set_stance("force_eager"):  # kron would compile itself
                    step_if(opt, torch.tensor(not bad))
        ends.append([list(model.parameters()), opt.state_dict()])
    assert same(*ends)


def test_a_plain_update_after_a_skipped_one_is_plain() -> None:
    """LookSAM would add its direction to the gradient of an update that it did not make."""
    ends = []
    for skip in (False, True):
        torch.manual_seed(0)
        model = randomized(LayerNormNet())
        opt = create_optimizer_v2(model, "samon", lr=0.01, ascent="every:2")
        first, second = (partial(loss_of, model, *batch(8, seed=seed)) for seed in (0, 1))
        samon.two_pass(opt, first)
        opt.step()
        if skip:
            samon.two_pass(opt, second)
        model.zero_grad()  # of which the optimizer learns nothing
        opt.expect_plain_step()
        second().backward()
        opt.step()
        assert opt.ascent.updates == 1
        ends.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def update(name: str, **how: Any) -> Any:
    """The second and third update on fake tensors, where any read on the host raises: whether the last was applied."""
    net, rho = how.pop("net", LayerNormNet), how.pop("rho", None)
    options = {key: how.pop(key) for key in ("groups", "bn_stats", "same_noise") if key in how}
    ema, progress = ModelEmaV3(nn.Linear(1, 1), decay=0.9), SimpleNamespace(sums={})
    with FakeTensorMode():
        model = net()
        if "perturb_frozen" in how:
            model.requires_grad_(False).head.requires_grad_(True)
        x, y = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
        if "adamw" in name:  # else it reads its own step, which lies on the CPU whatever the device
            how |= {"fused": True}
        opt = create_optimizer_v2(model, name, lr=0.01, weight_decay=0.01, **how)
        ema.module = net()  # as it would be copied: a fake tensor cannot be
        run, meter = run_of(model, opt, "cuda"), Meter(progress)
        for step in range(3):
            if rho is not None:
                opt.rho = rho.at(step, opt.param_groups[0]["lr"])
            opt.zero_grad()
            samon.two_pass(opt, lambda: F.cross_entropy(model(x), y), **options)
            if step == 0:  # the host has looked and takes it
                opt.step()
                continue
            norm, applied = apply_gradient(run)
            meter.add(8, {**opt.stats, "grad_norm": norm}, applied)
            ema.update(model, step=step)
        with pytest.raises(DataDependentOutputException):  # what the host would do
            apply_gradient(run_of(model, opt, "cpu"))
        return applied


# Every scope with every geometry, and every base but Muon, whose AdamW for vectors reads its own step on the CPU.
NAMES = [n for n, v in VARIANTS.items() if v.mask is None and (not n.endswith(BASED) or n.startswith("samon-layerl2"))]
NAMES.remove("samon-layerl2-muon")


OPTIONS: list[Settings] = [
    {"groups": 4},
    {"groups": 2, "net": BatchNormNet},
    {"bn_stats": "both", "same_noise": True, "net": BatchNormNet},
    {"perturb": "norms.3"},
    {"perturb": "blocks.2", "net": BatchNormNet},
    {"ascent": "previous"},
    {"ascent": "momentum"},
    *({"radius": radius, "groups": groups} for radius in ("raw", 0.5, "loss") for groups in (1, 4)),
    {"perturb_frozen": True},
    {"perturb_frozen": True, "net": BatchNormNet, "groups": 2},
    {"rho": samon.RhoSchedule("linear", 0.5, warmup=2)},
    {"rho": samon.RhoSchedule("lr", 0.5, lr_max=0.02)},
]


@pytest.mark.parametrize(
    ("name", "how"), [*((name, {}) for name in NAMES), *(("samon-layerl2-adamw", how) for how in OPTIONS)]
)
def test_nothing_reads_on_the_host(name: str, how: Settings) -> None:
    assert isinstance(update(name, **how), FakeTensor)  # not known to the host


def test_updates_that_were_not_applied_are_not_in_the_mean() -> None:
    means = []
    for form in (bool, torch.tensor):
        meter = Meter(SimpleNamespace(sums={}))
        for samples, value, applied in ((10, 1.0, True), (10, float("nan"), False), (20, 4.0, True)):
            meter.add(samples, {"loss": torch.tensor(value)}, form(applied))
        means.append((meter.read(lambda both: None), meter.epoch_mean("loss")))
    assert means[0] == means[1] == ({"loss": 3.0}, 3.0)
