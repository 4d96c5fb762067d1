"""Build what a run needs from its configuration: model, optimizer, loss, schedule. The data are in loaders.py."""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from timm.data import Mixup
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import samon
from samon.engines.fsdp import no_sync
from samon.engines.handover import create_base
from samon.errors import UserError, reraise_as_user_error
from samon.geometry import LOW_PRECISION, to_float32
from samon.trainer import fsdp as sharding
from samon.trainer import model as models
from samon.trainer.ablations import weight_decay_groups
from samon.trainer.config import Config, images_per_batch, mixes
from samon.trainer.distributed import DistInfo
from samon.trainer.flags import Settings
from samon.trainer.loaders import Batches, build_data, data_classes, without_counts
from samon.trainer.state import Progress, TrainState
from samon.two_pass import StepOptions
from samon.two_pass import check_step as check_two_pass

log = logging.getLogger("samon")


class Task(ClassificationTask):
    """timm's task, which owns the model as it is called (compiled, DDP), the loss and the weight average."""

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`{'loss': mean loss [], 'output': logits [B, C]}`, the loss in float32: autocast on the CPU would leave
        it in bfloat16, with 3 digits."""
        output = self.trainable_module(input)
        if not isinstance(output, Tensor):
            what = f"--model returns a {type(output).__name__} in training, not logits alone"
            raise UserError(f"{what}; drop aux_logits or similar from --model-kwargs")
        return {"loss": self.criterion(to_float32(output), target), "output": output}


@dataclass
class Run:
    """What the training loop works with."""

    config: Config  # with what was decided while building: it makes the same run, from args.yaml or a checkpoint
    dist_info: DistInfo
    model: nn.Module  # without compilation and DDP: the state dict's names, selection of parameters, validation
    task: Task
    optimizer: torch.optim.Optimizer
    sam: samon.SAM | None
    scheduler: Scheduler | None
    scaler: torch.amp.GradScaler | None
    autocast: Callable[[], AbstractContextManager[object]]
    mixup: Mixup | None  # on the host, where the loader does not mix
    train_loader: Batches
    eval_loader: Batches | None
    class_names: list[str] | None  # in the order of the labels
    class_map_digest: str  # of the labels that --class-map gives
    tail: samon.Tail | None  # which updates take two passes (--sam-tail)
    two_pass_updates: range  # numbers of the updates that perturb the weights
    rho_schedule: samon.RhoSchedule | None
    updates_per_epoch: int
    epochs: int  # with cycles, warm-up prefix and cool-down
    metric: str  # of the validation (or training) metrics, the one that decides the best checkpoint
    progress: Progress

    @property
    def ema(self) -> ModelEmaV3 | None:
        """The average of the weights."""
        return self.task.trainable_module_ema if self.task.has_ema() else None

    @property
    def stop(self) -> int:
        """Number of epochs after which this run ends."""
        return self.config.stop_epoch or self.epochs

    @property
    def images_per_sample(self) -> float:
        """Number of images of a sample: --aug-splits, or 0.5 with --mixup-mode half."""
        return images_per_batch(self.config) / self.config.batch_size

    @property
    def update(self) -> int:
        """Number of the next update, over the whole run."""
        return self.progress.epoch * self.updates_per_epoch + self.progress.updates

    @property
    def no_sync(self) -> Callable[[], AbstractContextManager[object]]:
        """Context for all micro-batches of an update but the last, in which no gradients are sent."""
        return no_sync(self.model) if self.config.fsdp else self.task.no_sync


def build(config: Config, dist_info: DistInfo, resumed: TrainState | None = None) -> Run:
    """Build a run: model, task, optimizer, data, schedule. The labels are numbered as in the state to resume from."""
    config = without_counts(models.resolve_precision(config, dist_info), dist_info)
    model = models.create_train_model(config.but(num_classes=data_classes(config)))
    classes = int(model.num_classes)  # type: ignore[arg-type]
    data_config = models.resolve_data_config(config, model)
    check_images(config, model, data_config["input_size"])
    model = lay_out(config, model, dist_info)
    task = build_task(config, model, dist_info)  # copies the model for its average, so before FSDP shards both
    if config.fsdp:
        mesh = sharding.make_mesh(config, dist_info)
        for module in [model, task.trainable_module_ema.module] if task.has_ema() else [model]:
            sharding.shard_model(config, module, dist_info, mesh)
    config = config.but(num_classes=classes, lr=learning_rate(config, dist_info.size))
    optimizer = build_optimizer(config, model)
    sam = samon.sam_of(optimizer)
    if sam is not None:
        config = config.but(rho=sam.rho, eta=sam.eta, no_replay=not replays(config, sam))
        check_step(config, sam)
    data = build_data(config, classes, data_config, dist_info, resumed)
    metric = config.eval_metric if data.eval_loader is not None else "loss"
    updates = math.ceil(len(data.train_loader) / config.grad_accum_steps)
    scheduler, epochs = build_schedule(config, optimizer, updates, metric)
    tail = None if sam is None or config.sam_tail is None else samon.Tail(epochs * updates, config.sam_tail)
    two_pass = range(0) if sam is None else two_pass_updates(config, tail, epochs, updates)
    distribute(config, task, model, dist_info)
    if sam is not None:
        if config.torchcompile:
            sam.compile(config.torchcompile, config.torchcompile_mode)
        sam.ascent.total = epochs * updates
    return Run(
        config=config.but(dist_bn="") if config.sync_bn and dist_info.size > 1 else config,
        dist_info=dist_info,
        model=model,
        task=task,
        optimizer=optimizer,
        sam=sam,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(dist_info.device.type) if config.amp and config.amp_dtype == "float16" else None,
        autocast=models.make_autocast(config, dist_info.device),
        mixup=data.mixup,
        train_loader=data.train_loader,
        eval_loader=data.eval_loader,
        class_names=data.class_names,
        class_map_digest=data.class_map_digest,
        tail=tail,
        two_pass_updates=two_pass,
        rho_schedule=None if sam is None else build_rho_schedule(config, sam, two_pass.start),
        updates_per_epoch=updates,
        epochs=epochs,
        metric=metric,
        progress=Progress(epoch=config.start_epoch or 0, start=config.start_epoch or 0),
    )


def check_step(config: Config, sam: samon.SAM) -> None:
    """Raise what the first two-pass step would raise, and the creation of --tail-opt."""
    if config.tail_opt is not None:
        try:
            create_base(sam, config.tail_opt, config.tail_lr, tail_options(config))
        except UserError as error:
            raise UserError(f"--tail-opt {config.tail_opt}: {error}") from None
    if config.perturb_frozen and all(p.requires_grad for p in sam.perturbed_parameters().values()):
        raise UserError("--perturb-frozen has no effect: the whole scope is trained; add --freeze, or drop it")
    m = config.m_sharpness
    grouped = isinstance(m, int) and (sam.can_group or sam.ascent.single_pass)
    options = StepOptions(
        partial_ascent=config.ascent_fraction < 1 or config.ascent_size is not None,
        groups=images_per_batch(config) // m if grouped else 1,
        reduce="global" if m == "global" else "device",
        bn_stats=config.bn_stats,
        replay=not config.no_replay,
    )
    check_two_pass(sam, options)


def check_images(config: Config, model: nn.Module, input_size: Sequence[int]) -> None:
    """Raise UserError if the model does not take images of --train-img-sizes or --ascent-size, or a pass over a single
    image leaves a BatchNorm layer with one value per channel."""
    channels, size, m = input_size[0], config.ascent_size, config.m_sharpness
    sides = sorted(config.train_img_sizes or [], reverse=True)
    sizes = [[channels, side, side] for side in sides] or [list(input_size)]
    if size is not None:
        if size >= min(sizes[-1][1:]):
            raise UserError(f"--ascent-size {size} must be smaller than the images, {sizes[-1][1:]}")
        sizes.append([channels, size, size])
    for image in sizes:
        if image != list(input_size) and (text := models.input_size_error(model, image)):
            raise UserError(
                f"{config.model} does not take images of {image} ({text}); drop --train-img-sizes or --ascent-size, or "
                "add --model-kwargs dynamic_img_size=True if the model has that argument"
            )
    batch = images_per_batch(config)
    images = min(m if isinstance(m, int) else batch, math.ceil(config.ascent_fraction * batch))
    if images == 1 and (layer := models.find_single_value_norm(model, sizes[-1])):
        raise UserError(
            f"{layer} normalizes over the batch and sees one value per channel of an image of {sizes[-1]}: a pass over "
            "a single image has no variance there; raise --m-sharpness or --batch-size, or use larger images"
        )


def lay_out(config: Config, model: nn.Module, dist_info: DistInfo) -> nn.Module:
    """Set split or synchronized BatchNorm, device, precision and memory format."""
    if config.split_bn:
        model = convert_splitbn_model(model, max(config.aug_splits, 2))
    # FSDP takes a model from the CPU, block by block: it need not fit on one device.
    model = models.place_model(config, model, torch.device("cpu") if config.fsdp else dist_info.device)
    if config.sync_bn and dist_info.size > 1:
        if dist_info.device.type == "cpu":
            raise UserError("--sync-bn: PyTorch's SyncBatchNorm runs on GPUs only; drop it on --device cpu")
        model = convert_sync_batchnorm(model)
    return model


def build_task(config: Config, model: nn.Module, dist_info: DistInfo) -> Task:
    """The task of the bare model, with its loss and weight average.

    For weights of half precision, which cannot hold the average's small steps, it is in float32. In bfloat16 timm
    would round stochastically, with a generator whose state no checkpoint has.
    """
    task = Task(model, build_loss(config), device=dist_info.device, verbose=False)
    if config.model_ema:
        task.setup_ema(
            decay=config.model_ema_decay,
            use_warmup=config.model_ema_warmup,
            device=torch.device("cpu") if config.model_ema_force_cpu else None,
            dtype=torch.float32 if models.parse_dtype(config.model_dtype) in LOW_PRECISION else None,
            foreach=not config.fsdp,  # foreach kernels do not mix sharded and replicated tensors
        )
    return task


def distribute(config: Config, task: Task, model: nn.Module, dist_info: DistInfo) -> None:
    """Compile the model, then wrap it for DDP; a sharded model is called as it is."""
    task.trainable_module = models.compile_model(config, model)
    if dist_info.size > 1 and not config.fsdp:
        ids = [dist_info.device] if dist_info.device.type != "cpu" else None
        renamed = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
        name = "forward_sync_buffers" if renamed else "broadcast_buffers"  # PyTorch 2.15 warns of the old name
        task.prepare_distributed(device_ids=ids, **{name: not config.no_ddp_bb})


def learning_rate(config: Config, world_size: int) -> float:
    """--lr, or --lr-base scaled with the global batch (by its square root for adaptive optimizers), as timm does."""
    if config.lr:
        return float(config.lr)
    ratio = world_size * config.batch_size * config.grad_accum_steps / config.lr_base_size
    name = f"{config.opt} {config.base_opt or ''}"
    scale = config.lr_base_scale or ("sqrt" if any(part in name for part in ("ada", "lamb")) else "linear")
    return float(config.lr_base * (ratio**0.5 if scale == "sqrt" else ratio))


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """timm's factory, with this package's arguments if the name is one of ours."""
    extra = dict(config.opt_kwargs)
    if samon.is_sam_name(config.opt):
        keys: tuple[str, ...] = ("rho", "eta", "radius", "base_opt", "perturb", "perturb_frozen", "sparsity")
        keys += ("ascent", "gsam_alpha", "esam_beta")
        extra |= {key: value for key in keys if (value := getattr(config, key)) is not None}
    if config.weight_decay_on:
        extra["param_group_fn"] = partial(weight_decay_groups, decay=config.weight_decay, on=config.weight_decay_on)
    with reraise_as_user_error(f"--opt {config.opt}"):
        return create_optimizer_v2(model, **optimizer_kwargs(cfg=config) | extra)


def replays(config: Config, sam: samon.SAM) -> bool:
    """Whether activations are replayed; logs which flag turns that off."""
    if config.no_replay:
        return False
    for flag in ("torchcompile", "grad_checkpointing", "fsdp"):
        if getattr(config, flag) and sam.selection.narrowed:
            name = f"--{flag.replace('_', '-')}"
            log.info("replay is off: it keeps activations from module to module, which %s does not allow", name)
            return False
    return True


def build_loss(config: Config) -> nn.Module:
    """timm's choice: JSD, soft targets under mixing, binary, label smoothing, or plain cross-entropy."""
    if config.jsd_loss:
        return JsdCrossEntropy(num_splits=config.aug_splits, smoothing=config.smoothing)
    if config.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0.0 if mixes(config) else config.smoothing,
            target_threshold=config.bce_target_thresh,
            sum_classes=config.bce_sum,
            pos_weight=config.bce_pos_weight,
        )
    if mixes(config):
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(smoothing=config.smoothing) if config.smoothing else nn.CrossEntropyLoss()


def tail_options(config: Config) -> Settings:
    """Arguments of --tail-opt: timm's of the first optimizer (--momentum, --opt-eps, --opt-betas, --opt-foreach), but
    not --opt-kwargs."""
    options = optimizer_kwargs(cfg=config)
    return {key: options[key] for key in ("momentum", "eps", "betas", "foreach") if key in options}


def two_pass_updates(config: Config, tail: samon.Tail | None, epochs: int, updates: int) -> range:
    """Numbers of the updates that perturb the weights (--sam-start-epoch, --sam-end-epoch, --sam-every, --sam-tail)."""
    every = config.sam_every
    first = config.sam_start_epoch * updates if tail is None else tail.start
    end = epochs if config.sam_end_epoch is None else min(epochs, config.sam_end_epoch)
    numbers = range(-(-first // every) * every, end * updates, every)
    if not numbers:
        raise UserError(
            f"none of the {epochs * updates} updates takes two passes; change --sam-start-epoch, --sam-end-epoch or "
            "--sam-every, or use the base optimizer"
        )
    return numbers


def build_rho_schedule(config: Config, sam: samon.SAM, start: int) -> samon.RhoSchedule | None:
    """rho over time, in updates of the whole run, of which `start` is the first with two passes; None if constant."""
    if config.rho_sched == "constant" and not config.rho_warmup:
        return None
    lr_max = 0.0 if config.sched in ("none", "constant") else config.lr
    return samon.RhoSchedule(
        config.rho_sched, sam.rho, config.rho_min, start, config.rho_warmup, lr_max=lr_max, lr_min=config.min_lr
    )


def tail_decay(config: Config) -> float:
    """--decay-epochs of wsd such that the decay starts with the tail and ends with the schedule, before a cooldown."""
    assert config.sam_tail is not None
    decaying = config.epochs - (0 if config.warmup_prefix else config.warmup_epochs)  # without warmup
    total = config.epochs + config.cooldown_epochs + (config.warmup_epochs if config.warmup_prefix else 0)
    decay = config.sam_tail * total - config.cooldown_epochs
    if decay <= 0:
        raise UserError(
            f"--sam-tail {config.sam_tail:g} lies in the {config.cooldown_epochs} --cooldown-epochs, where nothing "
            "decays; raise it, or give --decay-epochs"
        )
    return decay / decaying if decay < decaying else decaying  # below 1 timm takes a fraction, else epochs


def build_schedule(
    config: Config, optimizer: torch.optim.Optimizer, updates: int, metric: str
) -> tuple[Scheduler | None, int]:
    """timm's scheduler, if any, and the number of epochs with cycles, warm-up prefix and cool-down."""
    with reraise_as_user_error(f"--sched {config.sched}"):
        if config.sched == "wsd" and config.sam_tail is not None and config.decay_epochs is None:
            config = config.but(decay_epochs=tail_decay(config))
        config = config.but(decay_milestones=sorted(config.decay_milestones))
        kwargs = scheduler_kwargs(config, decreasing_metric=metric == "loss")
        scheduler, epochs = create_scheduler_v2(optimizer, **kwargs, updates_per_epoch=updates)
    if scheduler is None:  # timm applies the scale of --layer-decay in its schedules only
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    for flag, named in {"stop-epoch": [config.stop_epoch or 0], "save-epochs": config.save_epochs}.items():
        if max(named, default=0) > epochs:
            raise UserError(f"--{flag} {max(named)} of {epochs} epochs is never reached; raise --epochs")
    return scheduler, int(epochs)
