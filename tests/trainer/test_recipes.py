"""The recipes: every setting of the paper's Table 8 resolves to its values, the CIFAR ones to A.1 and Table 7."""

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

import samon
from samon.trainer import config
from samon.trainer.build import build_optimizer, build_schedule
from samon.trainer.flags import Settings
from tests.runs import ROOT, train

TABLE8: dict[str, Settings] = yaml.safe_load((ROOT / "tests/paper_table8.yaml").read_text())
SETTINGS = [(recipe, opt) for recipe, block in TABLE8.items() for opt in block["rho"]]
GRIDS: dict[str, dict[str, list[float]]] = yaml.safe_load((ROOT / "hparams/rho_grids.yaml").read_text())
CIFAR = sorted(path.stem for path in (ROOT / "hparams/cifar").glob("*.yaml"))


def parsed(path: str, *argv: str) -> config.Config:
    return config.parse(["-c", str(ROOT / "hparams" / path), *argv, "--print-config"])


def base_of(opt: str) -> str:
    return opt.rsplit("-", 1)[1] if opt.endswith(("-adamw", "-lion")) else opt if opt in ("adamw", "lion") else "sgd"


@pytest.mark.parametrize(("recipe", "opt"), SETTINGS)
def test_imagenet_recipe_is_the_papers_column(recipe: str, opt: str) -> None:
    """The resolved settings, and the optimizer that they build."""
    assert len(SETTINGS) == 23
    shared, c = TABLE8[recipe]["shared"], parsed(f"imagenet/{recipe}.yaml", "--opt", opt)
    assert (c.opt, c.rho) == (opt, TABLE8[recipe]["rho"][opt])
    for key in ("epochs", "warmup_epochs", "cooldown_epochs", "global_batch_size", "lr", "sched", "weight_decay"):
        assert getattr(c, key) == shared[key], key
    assert not c.warmup_prefix
    assert c.input_size == [3, shared["resolution"], shared["resolution"]]
    # m is the batch of one process if every process makes its own perturbation.
    assert (c.m_sharpness, c.batch_size, c.grad_accum_steps) == ("device", shared["m"], 1)
    assert shared["processes"] * c.batch_size == c.global_batch_size
    # Inception-style: area crop, flip, color jitter, and nothing stronger.
    assert (c.scale, c.hflip, c.color_jitter) == ([0.08, 1.0], 0.5, 0.4)
    assert not any((c.aa, c.mixup, c.cutmix, c.reprob, c.drop, c.drop_path, c.model_ema))
    sam, base = optimizers(c)
    assert (sam.rho if sam else None) == c.rho
    assert type(base).__name__.lower().startswith(base_of(opt))
    assert {g["weight_decay"] for g in base.param_groups} == {0.0, shared["weight_decay"]}
    assert {g["lr"] for g in base.param_groups} == {shared["lr"]}


def optimizers(c: config.Config) -> tuple[samon.SAM | None, torch.optim.Optimizer]:
    """SAM, if the name is one of ours, and the optimizer that applies the gradient."""
    with torch.device("meta"):
        model = timm.create_model(c.model.split(".")[0], num_classes=c.num_classes)
    optimizer = build_optimizer(c, model)
    sam = samon.sam_of(optimizer)
    return sam, sam.base if sam else optimizer


def curve(c: config.Config, updates: int = 4) -> list[float]:
    """Learning rate at the start of every epoch, or every update, exactly as the loop asks for it."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=c.lr)
    scheduler, epochs = build_schedule(c, optimizer, updates, "top1")
    rates = []
    for epoch in range(epochs):
        for update in range(updates if c.sched_on_updates else 1):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if c.sched_on_updates:
                scheduler.step_update(epoch * updates + update + 1)
        scheduler.step(epoch + 1)
    return rates


def cosine(t: float, total: float, top: float, low: float) -> float:
    return low + 0.5 * (top - low) * (1 + math.cos(math.pi * t / total))


def test_resnet50_schedule_is_90_epochs_with_3_of_warm_up_and_10_of_cool_down() -> None:
    rates = curve(parsed("imagenet/resnet50.yaml"))
    assert len(rates) == 100
    low, warm = 1e-5, 1e-4
    assert rates[:3] == pytest.approx([warm + t * (0.2 - warm) / 3 for t in range(3)])
    # The warm-up counts inside the 90: the cosine is already 3 epochs old when it takes over.
    assert rates[3:90] == pytest.approx([cosine(t, 90, 0.2, low) for t in range(3, 90)])
    assert rates[90:] == pytest.approx([low] * 10)


def test_vit_schedules() -> None:
    scratch = curve(parsed("imagenet/vit_s32_scratch.yaml"))
    assert len(scratch) == 300
    assert scratch[10:] == pytest.approx([cosine(t, 300, 1e-3, 1e-5) for t in range(10, 300)])
    tuned = curve(parsed("imagenet/vit_s16_in21k_ft.yaml"))
    assert len(tuned) == 9 * 4  # moves with every update, 4 of them an epoch here
    assert tuned[:4] == pytest.approx([1e-4 + t * (0.017 - 1e-4) / 4 for t in range(4)])
    assert tuned[4:] == pytest.approx([cosine(t, 36, 0.017, 1e-5) for t in range(4, 36)])


def test_cifar_schedule_is_torchs_cosine_annealing() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    expected = []
    for _ in range(200):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert curve(parsed("cifar/cifar100_resnet.yaml")) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("recipe", CIFAR)
def test_cifar_recipes_are_appendix_a1(recipe: str) -> None:
    c = parsed(f"cifar/{recipe}.yaml")
    data, kind = recipe.split("_")[:2]
    shared = {
        "epochs": 200,
        "smoothing": 0.1,
        "sched": "cosine",
        "weight_decay": 5e-4,
        "cooldown_epochs": 0,
        "warmup_epochs": 0,
        "min_lr": 0.0,
        "m_sharpness": "device",
        "train_crop_mode": "pad",
        "hflip": 0.5,
        "dataset": f"torch/{data}",
        "num_classes": int(data.removeprefix("cifar")),
        "crop_pct": 1.0,
    }
    if kind == "vit":
        shared |= {"lr": 1e-4, "batch_size": 64, "aa": "cifar10"}
    else:
        shared |= {"lr": 0.1, "momentum": 0.9, "batch_size": 128, "bn_stats": "both"}
        shared |= {"aa": "cifar10" if recipe.endswith("_aa") else None}
    assert {key: getattr(c, key) for key in shared} == shared
    assert c.global_batch_size == c.batch_size
    cfg = timm.get_pretrained_cfg(c.model)
    assert tuple(c.input_size) == cfg.input_size
    if data == "cifar10":
        assert (tuple(c.mean), tuple(c.std)) == (cfg.mean, cfg.std)


@pytest.mark.parametrize("recipe", CIFAR)
def test_cifar_rho_is_the_middle_of_the_papers_grid(recipe: str) -> None:
    """Every row of Table 7 has its entry in the recipe."""
    grid = GRIDS["_".join(recipe.split("_")[:2])]
    base = "-adamw" if "vit" in recipe else ""
    assert len(grid) == 12
    for opt, values in grid.items():
        rho = parsed(f"cifar/{recipe}.yaml", "--opt", opt + base).rho
        assert rho in values
        position = values.index(rho)
        assert abs(2 * position - (len(values) - 1)) <= 1


def test_cifar_optimizer_is_plain_sgd_with_decay_on_everything() -> None:
    for opt in ("sgd", "samon-layerl2"):
        (group,) = optimizers(parsed("cifar/cifar100_resnet.yaml", "--opt", opt))[1].param_groups
        assert (group["nesterov"], group["weight_decay"], group["momentum"]) == (False, 5e-4, 0.9)


@pytest.mark.parametrize("recipe", ["imagenet/vit_s32_scratch", "cifar/cifar10_vit"])
def test_muon_takes_the_settings_of_adamw(recipe: str) -> None:
    """timm scales Muon's updates to AdamW's, and the normalization parameters are AdamW's in both."""
    adamw = parsed(f"{recipe}.yaml", "--opt", "samon-adamw")
    for opt, rho in (("muon", None), ("samon-muon", adamw.rho)):
        c = parsed(f"{recipe}.yaml", "--opt", opt)
        assert (c.lr, c.weight_decay, c.rho) == (adamw.lr, adamw.weight_decay, rho)
        base = optimizers(c)[1]
        assert type(base).__name__ == "Muon"
        assert {(g["lr"], g["momentum"], tuple(g["betas"]), g["adjust_lr_fn"]) for g in base.param_groups} == {
            (c.lr, 0.95, (0.9, 0.95), "match_rms_adamw")
        }


def test_grids_are_table_7() -> None:
    """Spot values of Table 7, one per block, and the shapes of all rows (values counted in the paper)."""
    assert GRIDS["cifar100_resnet"]["samon"] == [0.1, 0.5, 1, 5]
    assert GRIDS["cifar10_resnet"]["sam-layerl2"] == [0.005, 0.01, 0.025, 0.05, 0.1]
    assert GRIDS["cifar10_vit"] == GRIDS["cifar100_vit"]
    assert GRIDS["cifar100_vit"]["samon-elemlinf"] == [0.025, 0.05, 0.1, 0.25, 0.5]
    lengths = {name: [len(values) for values in grid.values()] for name, grid in GRIDS.items()}
    assert lengths["cifar10_resnet"] == [3, 3, 5, 5, 5, 5, 4, 4, 5, 5, 5, 5]
    assert lengths["cifar100_resnet"] == [4, 4, 5, 5, 4, 4, 4, 4, 4, 4, 4, 5]
    assert lengths["cifar100_vit"] == [5] * 12


def test_every_recipe_says_how_to_run_it() -> None:
    for path in sorted((ROOT / "hparams").glob("*/*.yaml")):
        header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        name = path.relative_to(ROOT).as_posix()
        assert f"train.py -c {name}" in header, name
        assert "Hours" in header, name
        assert "leaves open" in header, name


@pytest.mark.parametrize(("recipe", "opt"), [("cifar10_resnet_aa", "samon-layerl2"), ("cifar100_vit", "samon-adamw")])
def test_cifar_recipes_train(recipe: str, opt: str, tmp_path: Path) -> None:
    """Two updates and a validation through train.py, the whole set on the device, from arrays."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8), np.arange(16) % 10
    np.savez(tmp_path / "tiny.npz", x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6])
    words = f"--opt {opt} --dataset npz/tiny --batch-size 8 --global-batch-size 8 --epochs 1 --device cpu"
    places = ["--data-dir", str(tmp_path), "--output", str(tmp_path), "--experiment", "run"]
    metrics = train(["-c", str(ROOT / f"hparams/cifar/{recipe}.yaml"), *words.split(), *places])
    assert math.isfinite(metrics["train_loss_perturbed"])
    assert metrics["train_loss_perturbed"] != metrics["train_loss"]
    assert metrics["eval_top1"] in [pytest.approx(100 * k / 6, abs=0.01) for k in range(7)]
