"""The data loaders of a run: which samples are read, and how they are mixed and augmented."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.data import FastCollateMixup, Mixup
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import SequentialSampler

from samon import data
from samon.data.classes import check_ranks
from samon.data.source_factory import is_sorted_by_class, open_source, source_options
from samon.data.sources import Source, find_overlap
from samon.data.stream import SampleStream
from samon.errors import UserError, reraise_as_user_error
from samon.trainer.config import Config, mixes
from samon.trainer.distributed import DistInfo
from samon.trainer.flags import Settings
from samon.trainer.model import parse_dtype
from samon.trainer.state import TrainState

log = logging.getLogger("samon")
Batches = data.Loader | data.InMemoryLoader
Log = Callable[[str], None]
# create_loader's arguments for training whose settings have another name, and those with the same one.
_RENAMED = {"re_prob": "reprob", "re_mode": "remode", "re_count": "recount", "re_split": "resplit"}
_RENAMED |= {"auto_augment": "aa", "num_aug_splits": "aug_splits", "num_workers": "workers"}
_AUGMENTATION = ["no_aug", "scale", "ratio", "hflip", "vflip", "train_crop_mode", "color_jitter", "color_jitter_prob"]
_AUGMENTATION += ["grayscale_prob", "gaussian_blur_prob", "worker_seeding"]


class Data(NamedTuple):
    """The loaders of a run and what else is known from its data."""

    train_loader: Batches
    eval_loader: Batches | None
    mixup: Mixup | None  # on the host, where the loader does not mix
    class_names: list[str] | None  # in the order of the labels
    class_map_digest: str  # of the labels that --class-map gives


def data_classes(config: Config) -> int | None:
    """--num-classes, or the number in the training data unless a pretrained head is kept."""
    pretrained_head = (config.pretrained and not config.pretrained_path) or config.initial_checkpoint
    if config.num_classes is not None or pretrained_head:
        return config.num_classes
    with reraise_as_user_error("data"):
        return open_source(config.dataset, config.data_dir, config.train_split, **source_options(config)).num_classes


def without_counts(config: Config, dist_info: DistInfo) -> Config:
    """Drop --train-num-samples and --val-num-samples if the first samples may all be of one class, as timm does."""
    counts = {key: None for key in ("train_num_samples", "val_num_samples") if getattr(config, key)}
    if not counts or not is_sorted_by_class(config.dataset):
        return config
    if dist_info.is_rank_zero:
        flags = " and ".join(f"--{key.replace('_', '-')}" for key in counts)
        where = config.dataset or "image folders"
        log.warning("%s: no effect on %s; name a part of a split, such as 'train[:5000]'", flags, where)
    return config.but(**counts)


def build_data(
    config: Config, classes: int, data_config: Settings, dist_info: DistInfo, resumed: TrainState | None = None
) -> Data:
    """Build the loaders of both splits and check them against each other and the model's outputs, which the run to
    resume has numbered."""
    log_once: Log = log.warning if dist_info.is_rank_zero else log.debug
    create = data.create_in_memory_loader if config.in_memory else data.create_loader
    shared = {key: data_config[key] for key in ("input_size", "mean", "std")} | {
        "pin_memory": config.pin_mem,
        "img_dtype": parse_dtype(config.model_dtype) or torch.float32,
        "device": dist_info.device,
        "use_prefetcher": not config.no_prefetcher,
    }
    with reraise_as_user_error("data"):
        mixup, collate = _mixing(config, classes)
        train = _dataset(config, data_config, config.train_split, dist_info)
        source = train.source
        if config.train_num_samples and train.size > len(source):
            count = f"--train-num-samples {config.train_num_samples}"
            log_once(f"{count}: an epoch passes more than once over the {len(source)} samples of {source.location}")
        digest = source.class_map_digest if resumed is None else number_as_before(source, resumed, log_once)
        check_ranks(source.class_names, len(source), source.location)
        _set_classes(train, classes, log_once)
        training = _training_kwargs(config, data_config, len(train) // config.batch_size)
        train_loader = create(train, collate_fn=collate, decoder=config.decoder, **shared, **training)
        if len(train_loader) == 0:
            raise UserError(f"--train-split {config.train_split} holds less than one batch; lower --batch-size")
        eval_loader = None
        if config.val_split:
            validation = _dataset(config, data_config, config.val_split, None)
            check_splits(config, source, validation.source, log_once)
            _set_classes(validation, classes, log.debug)
            check_ranks(validation.source.class_names, len(validation.source), validation.source.location)
            # Decoded as validate.py and timm decode, so that the same weights give the same figures there.
            eval_loader = create(
                validation,
                is_training=False,
                batch_size=config.validation_batch_size or config.batch_size,
                num_workers=config.workers,
                decoder="pil" if config.decoder == "auto" else config.decoder,
                **{key: data_config[key] for key in ("interpolation", "crop_pct", "crop_mode")},
                **shared,
            )
    return Data(train_loader, eval_loader, mixup, source.class_names, digest)


def number_as_before(source: Source, resumed: TrainState, log_once: Log) -> str:
    """Number the labels as the run to resume, by the names of the classes. Return the digest of the class map that
    numbers them; raise UserError if that is another one and classes have no names."""
    names, digest, before = source.class_names, source.class_map_digest, resumed.class_map_digest
    if names and resumed.class_names:
        if names != resumed.class_names:
            source.renumber(resumed.class_names)
            log_once(f"{source.location} has other classes than the run that is resumed: labels are numbered as there")
    elif before != digest and (before or not resumed.args.get("class_map")):  # earlier versions did not record it
        raise UserError(
            f"--class-map: {source.location} gets other labels than the run to resume was trained on; restore the "
            "file and the classes, or train on from the weights with --initial-checkpoint"
        )
    return before or digest


def check_splits(config: Config, train: Source, validation: Source, log_once: Log) -> None:
    """Check that the splits share no images; number the labels of validation as those of training."""
    if shared := find_overlap(train.extents, validation.extents):
        raise UserError(
            f"--train-split {config.train_split} and --val-split {config.val_split} share images, those of {shared}; "
            "give --data-dir the directory above the splits, name two splits or two parts such as train[:45000] and "
            "train[45000:], or --val-split '' for no validation"
        )
    if train.class_map_digest != validation.class_map_digest:
        where = f"{train.location} and {validation.location} number different classes"
        raise UserError(f"--class-map of integers: {where}; map their names instead")
    names, others = train.class_names, validation.class_names
    if names and others and names != others:
        validation.renumber(names)
        count = f"{len(others)} of the {len(names)} classes"
        log_once(f"{validation.location} has {count}: its labels are numbered as in training")


def _set_classes(stream: SampleStream, classes: int, log_once: Log) -> None:
    """Limit the labels to the model's classes."""
    place, count = stream.source.location, stream.source.num_classes
    if count and count > classes:
        raise UserError(f"{place} has {count} classes, the model {classes}; use --num-classes {count}")
    if count and count < classes:
        log_once(f"{place} has {count} classes, the model {classes}; --num-classes {count} fits")
    stream.num_classes = classes


def _mixing(config: Config, classes: int) -> tuple[Mixup | None, Mixup | None]:
    """`(host-side Mixup, collate function that mixes)`: one of them, or neither."""
    if not mixes(config):
        return None, None
    mixup = (Mixup if config.no_prefetcher else FastCollateMixup)(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=classes,
    )
    return (mixup, None) if config.no_prefetcher else (None, mixup)


def _dataset(config: Config, data_config: Settings, split: str, training: DistInfo | None) -> SampleStream:
    """A split, for training by the processes of `training`, or for validation if None."""
    size, samples = config.batch_size, config.train_num_samples
    if training is None:
        size, samples = config.validation_batch_size or size, config.val_num_samples
    elif config.train_batches_per_epoch:
        samples = config.train_batches_per_epoch * size * training.size
    # With --in-memory every process reads the whole set once, in order.
    ranks = {"rank": 0, "world_size": 1} if config.in_memory else {}
    return data.create_dataset(
        config.dataset,
        root=config.data_dir,
        split=split,
        is_training=training is not None and not config.in_memory,
        batch_size=size,
        input_img_mode=config.input_img_mode or ("RGB" if data_config["input_size"][0] == 3 else "L"),
        num_samples=samples,
        repeats=0 if config.train_batches_per_epoch else config.epoch_repeats,
        max_corrupt_fraction=config.max_corrupt_samples,
        sample_split=config.sample_split,
        shuffle_buffer=config.shuffle_buffer,
        seed=config.seed,
        **source_options(config),
        **ranks,
    )


def _training_kwargs(config: Config, data_config: Settings, batches: int) -> Settings:
    """create_loader's arguments for training, as timm's script sets them."""
    default = config.no_aug or not config.train_interpolation
    kwargs = {name: getattr(config, key) for name, key in _RENAMED.items()}
    kwargs |= {key: getattr(config, key) for key in _AUGMENTATION}
    kwargs |= {
        "batch_size": config.batch_size,
        "is_training": True,
        "num_aug_repeats": int(config.aug_repeats),
        "interpolation": data_config["interpolation"] if default else config.train_interpolation,
    }
    if config.train_img_sizes:
        sampler = ScheduledBatchSampler(
            SequentialSampler(range(batches)),
            batch_sizes=[1] * len(config.train_img_sizes),
            choice_weights=config.train_size_probs or None,
            seed=config.seed,
            num_batches=batches,
            choice_schedule=config.train_size_schedule,
            schedule_epochs=config.epochs,
            schedule_spread=config.train_size_schedule_spread,
            schedule_random_mix=config.train_size_random_mix,
        )
        kwargs["size_schedule"] = config.train_img_sizes, sampler
    return kwargs
