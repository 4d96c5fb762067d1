"""Configuration -> everything a run needs: model, optimizer, loss, schedule (loaders.py: data). One function each."""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from timm.data import Mixup
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import samon
from samon.engines.fsdp import no_sync
from samon.errors import UserError, reraise_as_user_error
from samon.geometry import LOW_PRECISION
from samon.trainer import fsdp as sharding
from samon.trainer import model as models
from samon.trainer.ablations import weight_decay_groups
from samon.trainer.config import Config
from samon.trainer.distributed import DistInfo
from samon.trainer.loaders import Batches, build_data, data_classes, mixing, without_counts
from samon.trainer.state import Progress

log = logging.getLogger("samon")


@dataclass(frozen=True)
class Settled:
    """What building decided where the configuration leaves it open."""

    num_classes: int
    lr: float
    dist_bn: str
    no_replay: bool
    rho: float | None  # of the sharpness-aware optimizer, its own default included
    eta: float | None


def nothing(*_: Any) -> None:
    pass


@dataclass
class Hooks:
    """Where tests and benchmarks look in: the run when it is built, each epoch's begin, each batch as the model sees
    it, each update, and the begin of a validation."""

    built: Callable[["Run"], None] = nothing
    batch: Callable[[Tensor, Tensor], None] = nothing
    begun: Callable[["Run", Progress], None] = nothing
    validating: Callable[["Run", Progress], None] = nothing
    updated: Callable[["Run", Progress, bool], None] = nothing  # the last: whether it was a two-pass update


@dataclass
class Run:
    """What the loop works with."""

    config: Config  # as it was asked for
    settled: Settled
    world: DistInfo
    model: nn.Module  # the bare model: state_dict, EMA, selection
    net: nn.Module  # what is called: compiled, and wrapped for DDP
    optimizer: torch.optim.Optimizer
    sam: samon.SAM | None
    scheduler: Scheduler | None
    scaler: torch.amp.GradScaler | None
    autocast: Callable[[], AbstractContextManager[Any]]
    ema: ModelEmaV3 | None
    loss: nn.Module
    mixup: Mixup | None  # host-side, where the loader does not mix
    train_loader: Batches
    eval_loader: Batches | None
    class_names: list[str] | None  # in the order of the labels
    updates_per_epoch: int
    epochs: int  # with cycles, warm-up prefix and cool-down
    metric: str  # what decides the best: a key of the validation (or training) metrics
    hooks: Hooks

    @property
    def stop(self) -> int:
        """Number of epochs after which this run ends."""
        return self.config.stop_epoch or self.epochs

    @property
    def effective(self) -> Config:
        """The configuration with what building settled, as args.yaml and checkpoints have it: it makes the same run."""
        return self.config.but(**asdict(self.settled))

    @property
    def no_sync(self) -> Callable[[], AbstractContextManager[Any]] | None:
        """Around all micro-batches of an update but the last: gradients are not sent yet."""
        return no_sync(self.model) if self.config.fsdp else getattr(self.net, "no_sync", None)


def build(config: Config, world: DistInfo, hooks: Hooks | None = None, class_names: list[str] | None = None) -> Run:
    """Everything, in timm's order but for the EMA, which copies a model that is not sharded yet: model, layout, EMA,
    optimizer, data, loss, processes, schedule.

    Args:
        class_names: of the run that is resumed, in the order of the model's outputs.
    """
    config = without_counts(models.resolve_precision(config, world), world)
    model = models.create_train_model(config.but(num_classes=data_classes(config)))
    classes = int(model.num_classes)  # type: ignore[arg-type]
    data_config = models.resolve_data_config(config, model)
    check_ascent_size(config, model, data_config["input_size"])
    check_batch_norm(config, model, data_config["input_size"])
    mesh = sharding.make_mesh(config, world) if config.fsdp else None
    model = lay_out(config, model, world)
    ema = build_ema(config, model)
    if mesh is not None:
        for one in (model, *([ema.module] if ema is not None else [])):
            sharding.shard_model(config, one, world, mesh)
    lr = learning_rate(config, world.size)
    optimizer = build_optimizer(config.but(lr=lr), model)
    sam = samon.sam_of(optimizer)
    read = build_data(config, classes, data_config, world, class_names)
    metric = config.eval_metric if read.eval_loader is not None else "loss"
    updates = math.ceil(len(read.train_loader) / config.grad_accum_steps)
    scheduler, epochs = build_schedule(config, optimizer, updates, metric)
    if (config.stop_epoch or 0) > epochs:
        raise UserError(f"--stop-epoch {config.stop_epoch} of {epochs} epochs: it is never reached; raise --epochs")
    if sam is not None and config.sam_start_epoch >= epochs:
        start = f"--sam-start-epoch {config.sam_start_epoch} of {epochs} epochs"
        raise UserError(f"{start}: none has the two-pass step; start earlier, or take the base optimizer")
    settled = Settled(
        num_classes=classes,
        lr=lr,
        dist_bn="" if config.sync_bn and world.size > 1 else config.dist_bn,
        no_replay=sam is not None and not replays(config, sam),
        rho=config.rho if sam is None else sam.rho,
        eta=config.eta if sam is None else sam.eta,
    )
    run = Run(
        config=config,
        settled=settled,
        world=world,
        model=model,
        net=wrap(config, model, world),
        optimizer=optimizer,
        sam=sam,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(world.device.type) if config.amp and config.amp_dtype == "float16" else None,
        autocast=models.make_autocast(config, world.device),
        ema=ema,
        loss=build_loss(config).to(world.device),
        **read._asdict(),
        updates_per_epoch=updates,
        epochs=epochs,
        metric=metric,
        hooks=hooks or Hooks(),
    )
    if sam is not None:
        if config.torchcompile:
            sam.compile(config.torchcompile, config.torchcompile_mode)
        sam.ascent.total = epochs * updates
    run.hooks.built(run)
    return run


def check_ascent_size(config: Config, model: nn.Module, input_size: Sequence[int]) -> None:
    """--ascent-size must be smaller than the images, and the model must take it."""
    if config.ascent_size is None:
        return
    if config.ascent_size >= min(input_size[1:]):
        raise UserError(f"--ascent-size {config.ascent_size} is to be smaller than the images, {input_size[1:]}")
    if text := models.input_size_error(model, [input_size[0], config.ascent_size, config.ascent_size]):
        raise UserError(
            f"--ascent-size {config.ascent_size}: {config.model} does not take such images; drop the flag, or add "
            f"--model-kwargs dynamic_img_size=True where it has that argument ({text})"
        )


def check_batch_norm(config: Config, model: nn.Module, input_size: Sequence[int]) -> None:
    """BatchNorm needs more than one value a channel, in the smallest part of a batch that a pass goes over."""
    m = config.m_sharpness
    images = min(m if isinstance(m, int) else config.batch_size, math.ceil(config.ascent_fraction * config.batch_size))
    if images == 1 and (layer := models.find_single_value_norm(model, input_size)):
        raise UserError(
            f"{layer} normalizes over the batch and sees one value a channel of an image of {list(input_size)}: passes "
            "over single images have no variance there; raise --m-sharpness or --batch-size, or take larger images"
        )


def lay_out(config: Config, model: nn.Module, world: DistInfo) -> nn.Module:
    """Split or synchronized BatchNorm, device, precision, memory format."""
    if config.split_bn:
        model = convert_splitbn_model(model, max(config.aug_splits, 2))
    # FSDP takes a model from the CPU, block by block: it need not fit on one device.
    model = models.place_model(config, model, replace(world, device=torch.device("cpu")) if config.fsdp else world)
    if config.sync_bn and world.size > 1:
        if world.device.type == "cpu":
            raise UserError("--sync-bn: PyTorch's SyncBatchNorm runs on GPUs only; drop it on --device cpu")
        model = convert_sync_batchnorm(model)
    return model


def learning_rate(config: Config, world_size: int) -> float:
    """--lr, or --lr-base scaled with the global batch (by its root for adaptive optimizers), as timm does."""
    if config.lr:
        return float(config.lr)
    ratio = world_size * config.batch_size * config.grad_accum_steps / config.lr_base_size
    name = f"{config.opt} {config.base_opt or ''}".lower()
    scale = config.lr_base_scale or ("sqrt" if any(part in name for part in ("ada", "lamb")) else "linear")
    return float(config.lr_base * (ratio**0.5 if scale == "sqrt" else ratio))


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """timm's factory, with this package's arguments where the name is one of ours."""
    extra = dict(config.opt_kwargs)
    if samon.is_sam_name(config.opt):
        keys = ("rho", "eta", "base_opt", "perturb", "sparsity", "ascent", "gsam_alpha", "esam_beta")
        ours = {key: getattr(config, key) for key in keys}
        extra |= {key: value for key, value in ours.items() if value is not None}
    if config.weight_decay_on:
        extra["param_group_fn"] = partial(weight_decay_groups, decay=config.weight_decay, on=config.weight_decay_on)
    with reraise_as_user_error(f"--opt {config.opt}"):
        return create_optimizer_v2(model, **optimizer_kwargs(cfg=config) | extra)


def replays(config: Config, sam: samon.SAM) -> bool:
    """Whether replay stays on; says at the start which of the step's economies do not combine with the model's way."""
    others = {"--torchcompile": config.torchcompile, "--grad-checkpointing": config.grad_checkpointing}
    other = next((flag for flag, given in (others | {"--fsdp": config.fsdp}).items() if given), None)
    if other and sam.selection.narrowed and not config.no_replay:
        log.info(f"replay is off: it keeps activations from module to module, which {other} does not allow")
        return False
    return not config.no_replay


def build_ema(config: Config, model: nn.Module) -> ModelEmaV3 | None:
    """timm's average of the weights, in float32 for weights of half precision, which cannot hold its small steps.

    In bfloat16 timm would round at random instead, by a generator that no checkpoint has.
    """
    if not config.model_ema:
        return None
    return ModelEmaV3(
        model,
        decay=config.model_ema_decay,
        use_warmup=config.model_ema_warmup,
        device=torch.device("cpu") if config.model_ema_force_cpu else None,
        dtype=torch.float32 if models.parse_dtype(config.model_dtype) in LOW_PRECISION else None,
        foreach=not config.fsdp,  # no foreach of both kinds
    )


def build_loss(config: Config) -> nn.Module:
    """timm's choice: JSD, soft targets under mixing, binary, label smoothing, or plain cross-entropy."""
    if config.jsd_loss:
        return JsdCrossEntropy(num_splits=config.aug_splits, smoothing=config.smoothing)
    mixed = mixing(config)
    if config.bce_loss:
        smoothing = 0.0 if mixed else config.smoothing
        how = {"sum_classes": config.bce_sum, "pos_weight": config.bce_pos_weight}
        return BinaryCrossEntropy(smoothing=smoothing, target_threshold=config.bce_target_thresh, **how)
    if mixed:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=config.smoothing) if config.smoothing else nn.CrossEntropyLoss()


def build_schedule(config: Config, optimizer: Any, updates: int, metric: str) -> tuple[Scheduler | None, int]:
    """(timm's scheduler or None, epochs with cycles, warm-up prefix and cool-down)."""
    with reraise_as_user_error(f"--sched {config.sched}"):
        kwargs = scheduler_kwargs(config, decreasing_metric=metric == "loss")
        scheduler, epochs = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates)
    if scheduler is None:  # timm leaves it to a schedule to apply the scale of --layer-decay
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return scheduler, int(epochs)


def wrap(config: Config, model: nn.Module, world: DistInfo) -> nn.Module:
    """Compile, then DistributedDataParallel; a sharded model is called as it is."""
    net = models.compile_model(config, model)
    if world.size > 1 and not config.fsdp:
        ids = [world.device] if world.device.type != "cpu" else None
        ddp = nn.parallel.DistributedDataParallel
        renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # PyTorch 2.15 warns of the old name
        shared: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": not config.no_ddp_bb}
        net = ddp(net, device_ids=ids, **shared)
    return net
