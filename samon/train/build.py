"""Configuration -> everything a run needs: processes, model, optimizer, data, loss, schedule. One function each."""

import inspect
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm import utils
from timm.data import FastCollateMixup, Mixup, resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import nn

import samon
from samon import data
from samon.data.sizes import SizeSchedule
from samon.errors import UserError, user_errors
from samon.session.model import freeze, weights_checked
from samon.session.world import World
from samon.settings.config import Config
from samon.settings.flag import nearest

log = logging.getLogger("samon")


@dataclass
class Run:
    """What the loop works with."""

    config: Config
    world: World
    model: nn.Module  # the bare model: state_dict, EMA, selection
    net: nn.Module  # what is called: compiled, and wrapped for DDP
    optimizer: torch.optim.Optimizer
    scheduler: Any
    epochs: int
    scaler: Any
    autocast: Callable[[], AbstractContextManager]
    ema: Any
    loss: nn.Module
    mixup: Any  # host-side Mixup where the loader does not mix
    train_loader: Any
    eval_loader: Any
    metric: str  # what decides the best: a key of the validation (or training) metrics

    @property
    def sam(self) -> Any:
        return samon.sam_of(self.optimizer)

    @property
    def updates_per_epoch(self) -> int:
        return math.ceil(len(self.train_loader) / self.config.grad_accum_steps)


def build(config: Config, world: World) -> Run:
    """Everything, in timm's order: model, layout, optimizer, EMA, data, loss, processes, schedule."""
    config.num_classes, model = build_model(config, world)
    data_config = resolve_data_config(vars(config), model=model)
    model = lay_out(config, model, world)
    config.lr = learning_rate(config, world.size)
    optimizer = build_optimizer(config, model)
    settle_step(config, samon.sam_of(optimizer))
    autocast, scaler = precision(config, world.device)
    ema = build_ema(config, model)
    train_loader, eval_loader, mixup = build_data(config, data_config, world)
    net = wrap(config, model, world)
    metric = config.eval_metric if eval_loader is not None else "loss"
    updates = math.ceil(len(train_loader) / config.grad_accum_steps)
    scheduler, epochs = build_schedule(config, optimizer, updates, metric)
    loss = build_loss(config).to(world.device)
    return Run(
        config,
        world,
        model,
        net,
        optimizer,
        scheduler,
        epochs,
        scaler,
        autocast,
        ema,
        loss,
        mixup,
        train_loader,
        eval_loader,
        metric,
    )


def build_model(c: Config, world: World) -> tuple[int, nn.Module]:
    """(number of classes, model) by timm's factory, with the head's initial scale and bias."""
    if not c.model.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(c.model):
        raise UserError(f"--model: unknown model {c.model!r}{nearest(c.model.split('.')[0], timm.list_models())}")
    for key in ("initial_checkpoint", "pretrained_path"):
        if (path := getattr(c, key)) and not Path(path).exists():
            raise UserError(f"--{key.replace('_', '-')}: no file {path}")
    set_fast_norm(c.fast_norm)
    weights = {"file": c.pretrained_path, "num_classes": -1}
    overlay: dict[str, Any] = {"pretrained_cfg_overlay": weights} if c.pretrained_path else {}
    checked = weights_checked(c.pretrained_path) if c.pretrained_path else nullcontext()
    with user_errors(f"--model {c.model}"), checked:
        model: Any = timm.create_model(
            c.model,
            pretrained=c.pretrained or bool(c.pretrained_path),
            in_chans=c.in_chans or (c.input_size or [3])[0],
            num_classes=c.num_classes,
            drop_rate=c.drop,
            drop_path_rate=c.drop_connect if c.drop_path is None else c.drop_path,
            drop_block_rate=c.drop_block,
            global_pool=c.gp,
            bn_momentum=c.bn_momentum,
            bn_eps=c.bn_eps,
            checkpoint_path=c.initial_checkpoint,
            **overlay,
            **c.model_kwargs,
        )
        if c.head_init_scale is not None or c.head_init_bias is not None:
            _init_head(model.get_classifier(), c.head_init_scale, c.head_init_bias)
        if c.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
        if c.freeze:
            freeze(model, c.freeze)
    return model.num_classes, model


@torch.no_grad()
def _init_head(head: Any, scale: float | None, bias: float | None) -> None:
    if scale is not None:
        for parameter in head.parameters():
            parameter.mul_(scale)
    if bias is not None:
        head.bias.fill_(bias)


def lay_out(c: Config, model: nn.Module, world: World) -> nn.Module:
    """Split or synchronized BatchNorm, device, precision, memory format."""
    if c.split_bn:
        model = convert_splitbn_model(model, max(c.aug_splits, 2))
    model.to(device=world.device, dtype=getattr(torch, c.model_dtype) if c.model_dtype else None)
    if c.channels_last:
        model.to(memory_format=torch.channels_last)
    if c.sync_bn and world.size > 1:
        if world.device.type == "cpu":
            raise UserError("--sync-bn: PyTorch's SyncBatchNorm runs on GPUs only; drop it on --device cpu")
        c.dist_bn = ""
        model = convert_sync_batchnorm(model)
    return model


def learning_rate(c: Config, world_size: int) -> float:
    """--lr, or --lr-base scaled with the global batch (by its root for adaptive optimizers), as timm does."""
    if c.lr:
        return c.lr
    ratio = world_size * c.batch_size * c.grad_accum_steps / c.lr_base_size
    name = f"{c.opt} {c.base_opt or ''}".lower()
    scale = c.lr_base_scale or ("sqrt" if any(part in name for part in ("ada", "lamb")) else "linear")
    return c.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def build_optimizer(c: Config, model: nn.Module) -> torch.optim.Optimizer:
    """timm's factory, with this package's arguments where the name is one of ours."""
    extra = dict(c.opt_kwargs)
    if samon.is_sam_name(c.opt):
        ours = {key: getattr(c, key) for key in ("rho", "eta", "base_opt", "perturb", "sparsity")}
        extra |= {key: value for key, value in ours.items() if value is not None}
    with user_errors(f"--opt {c.opt}"):
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=c) | extra)
    sam = samon.sam_of(optimizer)
    if sam is not None and getattr(sam.base, "is_second_order", False):
        raise UserError(f"--base-opt {c.base_opt} needs second derivatives, which the two-pass step does not keep")
    return optimizer


def settle_step(c: Config, sam: Any) -> None:
    """Say at the start which of the step's economies do not combine with how the model is run."""
    if sam is None:
        return
    m = c.m_sharpness
    grouped = sam.scope == "samon" and m not in ("device", "global") and int(m) < c.batch_size
    if c.torchcompile and grouped:
        raise UserError(
            f"--m-sharpness {m} puts other normalization layers into the model at every step, which compiled graphs "
            "cannot follow; drop --torchcompile or take --m-sharpness device"
        )
    other = "--torchcompile" if c.torchcompile else "--grad-checkpointing" if c.grad_checkpointing else None
    if other and sam.selection.narrowed and not c.no_replay:
        log.info(f"replay is off: it keeps activations from module to module, which {other} does not allow")
        c.no_replay = True


def precision(c: Config, device: torch.device) -> tuple[Callable[[], AbstractContextManager], Any]:
    """(autocast context, gradient scaler for float16 or None)."""
    if not c.amp:
        return nullcontext, None
    scaler = torch.amp.GradScaler(device.type) if c.amp_dtype == "float16" else None
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, c.amp_dtype)), scaler


def build_ema(c: Config, model: nn.Module) -> Any:
    if not c.model_ema:
        return None
    device = torch.device("cpu") if c.model_ema_force_cpu else None
    return utils.ModelEmaV3(model, decay=c.model_ema_decay, use_warmup=c.model_ema_warmup, device=device)


def build_loss(c: Config) -> nn.Module:
    """timm's choice: JSD, soft targets under mixing, binary, label smoothing, or plain cross-entropy."""
    if c.jsd_loss:
        return JsdCrossEntropy(num_splits=c.aug_splits, smoothing=c.smoothing)
    mixed = mixing(c)
    if c.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0.0 if mixed else c.smoothing,
            target_threshold=c.bce_target_thresh,
            sum_classes=c.bce_sum,
            pos_weight=c.bce_pos_weight,
        )
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=c.smoothing) if c.smoothing else nn.CrossEntropyLoss()


def mixing(c: Config) -> bool:
    return c.mixup > 0 or c.cutmix > 0 or c.cutmix_minmax is not None


def build_schedule(c: Config, optimizer: Any, updates: int, metric: str) -> tuple[Any, int]:
    """(timm's scheduler or None, epochs with cycles, warm-up prefix and cool-down)."""
    with user_errors(f"--sched {c.sched}"):
        kwargs = scheduler_kwargs(c, decreasing_metric=metric == "loss")
        kwargs["decay_epochs"] = c.decay_epochs or (0.2 if c.sched in ("wsd", "rsqrt") else 90)
        scheduler, epochs = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates)
    return scheduler, int(epochs)


def wrap(c: Config, model: nn.Module, world: World) -> nn.Module:
    """Compile, then DistributedDataParallel."""
    net: nn.Module = model
    if c.torchcompile:
        with user_errors("--torchcompile"):
            net = torch.compile(model, backend=c.torchcompile, mode=c.torchcompile_mode)  # type: ignore[assignment]
    if world.size > 1:
        ids = [world.device] if world.device.type != "cpu" else None
        ddp = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # PyTorch 2.15 warns of the old name
        shared: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": not c.no_ddp_bb}
        net = ddp(net, device_ids=ids, **shared)
    return net


# --- data -----------------------------------------------------------------------------------------------------------


def build_data(c: Config, data_config: dict[str, Any], world: World) -> tuple[Any, Any, Any]:
    """(training loader, validation loader or None, host-side Mixup or None)."""
    if not c.data_dir and not c.dataset.startswith(("torch/", "hfds/", "hfids/", "tfds/")):
        raise UserError("no data: name its directory with --data-dir")
    dtype = getattr(torch, c.model_dtype) if c.model_dtype else torch.float32
    shared = {
        "input_size": data_config["input_size"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "pin_memory": c.pin_mem,
        "img_dtype": dtype,
        "device": world.device,
        "distributed": world.size > 1,
        "use_prefetcher": not c.no_prefetcher,
        "decoder": c.decoder,
    }
    with user_errors("data"):
        mixup, collate = _mixing(c)
        if c.train_batches_per_epoch:
            c.train_num_samples = c.train_batches_per_epoch * c.batch_size * world.size
        train = _dataset(c, data_config, c.train_split, True)
        make = data.create_resident_loader if c.data_resident else data.create_loader
        sizes: dict[str, Any] = {}
        if c.train_img_sizes:
            sizes["size_schedule"] = _size_schedule(c, len(train) // c.batch_size)
        train_loader = make(train, collate_fn=collate, **shared, **sizes, **_train_kwargs(c, data_config))
        if len(train_loader) == 0:
            raise UserError(f"--train-split {c.train_split} holds less than one batch; lower --batch-size")
        if not c.val_split:
            return train_loader, None, mixup
        eval_loader = make(
            _dataset(c, data_config, c.val_split, False),
            **shared,
            is_training=False,
            batch_size=c.validation_batch_size or c.batch_size,
            interpolation=data_config["interpolation"],
            num_workers=c.workers,
            crop_pct=data_config["crop_pct"],
            crop_mode=data_config["crop_mode"],
        )
    return train_loader, eval_loader, mixup


def _mixing(c: Config) -> tuple[Any, Any]:
    """(host-side Mixup, collate function that mixes): one of them, or neither."""
    if not mixing(c):
        return None, None
    kwargs = {
        "mixup_alpha": c.mixup,
        "cutmix_alpha": c.cutmix,
        "cutmix_minmax": c.cutmix_minmax,
        "prob": c.mixup_prob,
        "switch_prob": c.mixup_switch_prob,
        "mode": c.mixup_mode,
        "label_smoothing": c.smoothing,
        "num_classes": c.num_classes,
    }
    return (Mixup(**kwargs), None) if c.no_prefetcher else (None, FastCollateMixup(**kwargs))


def _dataset(c: Config, data_config: dict[str, Any], split: str, training: bool) -> Any:
    extra: dict[str, Any] = {"repeats": c.epoch_repeats} if training else {}
    if c.data_resident:  # every process reads the whole set once, from front to back
        extra = {"rank": 0, "world_size": 1}
    return data.create_dataset(
        c.dataset,
        root=c.data_dir,
        split=split,
        is_training=training and not c.data_resident,
        seed=c.seed,
        batch_size=c.batch_size if training else c.validation_batch_size or c.batch_size,
        class_map=c.class_map,
        input_key=c.input_key,
        target_key=c.target_key,
        download=c.dataset_download,
        input_img_mode=c.input_img_mode or ("RGB" if data_config["input_size"][0] == 3 else "L"),
        num_samples=c.train_num_samples if training else c.val_num_samples,
        trust_remote_code=c.dataset_trust_remote_code,
        num_classes=c.num_classes,
        sample_split=c.sample_split,
        shuffle_buffer=c.shuffle_buffer,
        shard_cache=c.shard_cache,
        shard_cache_size=int(c.shard_cache_size * 2**30),
        allow_shell_urls=c.allow_shell_urls,
        max_bad_fraction=c.max_bad_samples,
        **extra,
    )


def _train_kwargs(c: Config, data_config: dict[str, Any]) -> dict[str, Any]:
    """create_loader's arguments for training, as timm's script fills them."""
    interpolation = data_config["interpolation"] if c.no_aug or not c.train_interpolation else c.train_interpolation
    return {
        "batch_size": c.batch_size,
        "is_training": True,
        "no_aug": c.no_aug,
        "re_prob": c.reprob,
        "re_mode": c.remode,
        "re_count": c.recount,
        "re_split": c.resplit,
        "train_crop_mode": c.train_crop_mode,
        "scale": c.scale,
        "ratio": c.ratio,
        "hflip": c.hflip,
        "vflip": c.vflip,
        "color_jitter": c.color_jitter,
        "color_jitter_prob": c.color_jitter_prob,
        "grayscale_prob": c.grayscale_prob,
        "gaussian_blur_prob": c.gaussian_blur_prob,
        "auto_augment": c.aa,
        "num_aug_repeats": int(c.aug_repeats),
        "num_aug_splits": c.aug_splits,
        "interpolation": interpolation,
        "num_workers": c.workers,
        "worker_seeding": c.worker_seeding,
        "use_multi_epochs_loader": c.use_multi_epochs_loader,
    }


def _size_schedule(c: Config, batches: int) -> SizeSchedule:
    probabilities = tuple(c.train_size_probs) if c.train_size_probs else None
    return SizeSchedule(
        tuple(c.train_img_sizes),
        probabilities,
        batches,
        c.seed,
        c.train_size_schedule == "progressive",
        c.epochs,
        c.train_size_schedule_spread,
        c.train_size_random_mix,
    )
