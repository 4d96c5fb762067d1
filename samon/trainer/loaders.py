"""Configuration -> the loaders of a run: what is read, how it is mixed and augmented."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.data import FastCollateMixup, Mixup
from timm.data.scheduled_sampler import ScheduledBatchSampler
from torch.utils.data import SequentialSampler

from samon import data
from samon.data.classes import check_ranks
from samon.data.sources import Source, find_overlap, is_sorted_by_class, open_source
from samon.data.stream import SampleStream
from samon.errors import UserError, reraise_as_user_error
from samon.trainer.config import Config
from samon.trainer.distributed import DistInfo
from samon.trainer.model import parse_dtype

log = logging.getLogger("samon")


Batches = data.Loader | data.InMemoryLoader


class Data(NamedTuple):
    """What a run reads, by the names that `build.Run` has for it."""

    train_loader: Batches
    eval_loader: Batches | None  # to validate on
    mixup: Mixup | None  # host-side, where the loader does not mix
    class_names: list[str] | None  # in the order of the labels


# Arguments of create_loader for training, and the settings that fill them; then those of create_dataset.
_AUGMENTATION = {
    **{"re_prob": "reprob", "re_mode": "remode", "re_count": "recount", "re_split": "resplit", "auto_augment": "aa"},
    **{"num_aug_splits": "aug_splits", "num_workers": "workers"},
    **{key: key for key in ("no_aug", "scale", "ratio", "hflip", "vflip", "train_crop_mode", "color_jitter")},
    **{key: key for key in ("color_jitter_prob", "grayscale_prob", "gaussian_blur_prob", "worker_seeding")},
}
_DATASET = ("sample_split", "shuffle_buffer", "seed")


def data_classes(config: Config) -> int | None:
    """--num-classes; where nothing is said and no pretrained head is kept, the number in the training data."""
    kept = config.pretrained and not config.pretrained_path
    if config.num_classes is not None or kept or config.initial_checkpoint:
        return config.num_classes
    with reraise_as_user_error("data"):
        return open_source(config.dataset, config.data_dir, config.train_split, **_opening(config)).num_classes


def without_counts(config: Config, world: DistInfo) -> Config:
    """Drop --train-num-samples and --val-num-samples where the first samples may be all of one class, as timm does."""
    counts = {key: None for key in ("train_num_samples", "val_num_samples") if getattr(config, key)}
    if not counts or not is_sorted_by_class(config.dataset):
        return config
    if world.is_rank_zero:
        flags = " and ".join(f"--{key.replace('_', '-')}" for key in counts)
        log.warning("%s: no effect on image folders and hfds/; a split may be a part, such as 'train[:5000]'", flags)
    return config.but(**counts)


def check_splits(config: Config, train: Source, held: Source, say: Callable[[str], Any]) -> None:
    """Validation must be of other images than training, and its labels must mean what training's mean.

    Raises:
        UserError: the same images, or a class that is not trained.
    """
    if shared := find_overlap(train.extents, held.extents):
        raise UserError(
            f"--train-split {config.train_split} and --val-split {config.val_split} share images, those of {shared}; "
            "give --data-dir the directory above the splits, name two of them, two parts such as "
            "train[:45000] and train[45000:], or --val-split '' for no validation"
        )
    names, others = train.class_names, held.class_names
    if names and others and names != others:
        held.renumber(names)
        say(f"{held.location} has {len(others)} of the {len(names)} classes: its labels are numbered as in training")


def _set_classes(stream: SampleStream, classes: int, say: Callable[[str], Any]) -> None:
    """Let no label reach the model's number of classes.

    Raises:
        UserError: the data have more classes.
    """
    place, found = stream.source.location, stream.source.num_classes
    if found and found > classes:
        raise UserError(f"{place} has {found} classes, the model {classes}; use --num-classes {found}")
    if found and found < classes:
        say(f"{place} has {found} classes, the model {classes}; --num-classes {found} fits")
    stream.num_classes = classes


def follow_classes(source: Source, trained: list[str] | None, say: Callable[[str], Any]) -> None:
    """Number the labels of a resumed run's training data as when it was started.

    Raises:
        UserError: a class that the run was not trained on.
    """
    names = source.class_names
    if trained and names and names != trained:
        source.renumber(trained)
        say(f"{source.location}: its classes differ from the resumed run's; labels are numbered as there")


def build_data(
    config: Config, classes: int, data_config: dict[str, Any], world: DistInfo, trained: list[str] | None = None
) -> Data:
    """Loaders over both splits, checked against each other.

    Args:
        trained: the classes of the run that is resumed, in the order of the model's outputs.
    """
    shared = {
        **{key: data_config[key] for key in ("input_size", "mean", "std")},
        "pin_memory": config.pin_mem,
        "img_dtype": parse_dtype(config.model_dtype) or torch.float32,
        "device": world.device,
        "use_prefetcher": not config.no_prefetcher,
    }
    say = log.warning if world.is_rank_zero else log.debug  # once
    make: Any = data.create_in_memory_loader if config.data_resident else data.create_loader
    with reraise_as_user_error("data"):
        mixup, collate = _mixing(config, classes)
        train = _dataset(config, data_config, config.train_split, world)
        source = train.source
        if config.train_num_samples and train.size > len(source):
            asked = f"--train-num-samples {config.train_num_samples}"
            say(f"{asked}: an epoch passes more than once over the {len(source)} samples of {source.location}")
        follow_classes(source, trained, say)
        check_ranks(source.class_names, len(source), source.location)
        _set_classes(train, classes, say)
        training = _train_kwargs(config, data_config, len(train) // config.batch_size)
        train_loader: Batches = make(train, collate_fn=collate, decoder=config.decoder, **shared, **training)
        if len(train_loader) == 0:
            raise UserError(f"--train-split {config.train_split} holds less than one batch; lower --batch-size")
        eval_loader: Batches | None = None
        if config.val_split:
            held = _dataset(config, data_config, config.val_split, None)
            check_splits(config, source, held.source, say)
            _set_classes(held, classes, log.debug)
            check_ranks(held.source.class_names, len(held.source), held.source.location)
            # Decoded as validate.py and timm decode, so that the same weights give the same figure there.
            eval_loader = make(
                held,
                is_training=False,
                batch_size=config.validation_batch_size or config.batch_size,
                num_workers=config.workers,
                decoder="pil" if config.decoder == "auto" else config.decoder,
                **{key: data_config[key] for key in ("interpolation", "crop_pct", "crop_mode")},
                **shared,
            )
    return Data(train_loader, eval_loader, mixup, source.class_names)


def _mixing(config: Config, classes: int) -> tuple[Mixup | None, Any]:
    """(host-side Mixup, collate function that mixes): one of them, or neither."""
    if not mixing(config):
        return None, None
    kwargs = {
        "mixup_alpha": config.mixup,
        "cutmix_alpha": config.cutmix,
        "cutmix_minmax": config.cutmix_minmax,
        "prob": config.mixup_prob,
        "switch_prob": config.mixup_switch_prob,
        "mode": config.mixup_mode,
        "label_smoothing": config.smoothing,
        "num_classes": classes,
    }
    return (Mixup(**kwargs), None) if config.no_prefetcher else (None, FastCollateMixup(**kwargs))


def _dataset(config: Config, data_config: dict[str, Any], split: str, training: DistInfo | None) -> SampleStream:
    """A split: to train on by the processes of `training`, or None to validate on."""
    size, samples = config.batch_size, config.train_num_samples
    if training is None:
        size, samples = config.validation_batch_size or size, config.val_num_samples
    elif config.train_batches_per_epoch:
        samples = config.train_batches_per_epoch * size * training.size
    # With --data-resident every process reads the whole set once, from front to back.
    ranks: dict[str, Any] = {"rank": 0, "world_size": 1} if config.data_resident else {}
    return data.create_dataset(
        config.dataset,
        root=config.data_dir,
        split=split,
        is_training=training is not None and not config.data_resident,
        batch_size=size,
        input_img_mode=config.input_img_mode or ("RGB" if data_config["input_size"][0] == 3 else "L"),
        num_samples=samples,
        repeats=config.epoch_repeats,  # counts in training alone
        max_corrupt_fraction=config.max_bad_samples,
        **{key: getattr(config, key) for key in _DATASET},
        **_opening(config),
        **ranks,
    )


def _opening(config: Config) -> dict[str, Any]:
    """What `open_source` wants to know beside name, root and split."""
    keys = ("class_map", "input_key", "target_key", "allow_shell_urls", "shard_cache")
    return {key: getattr(config, key) for key in keys} | {
        "download": config.dataset_download,
        "trust_remote_code": config.dataset_trust_remote_code,
        "shard_cache_size": int(config.shard_cache_size * 2**30),
    }


def _train_kwargs(config: Config, data_config: dict[str, Any], batches: int) -> dict[str, Any]:
    """create_loader's arguments for training, as timm's script fills them."""
    plain = config.no_aug or not config.train_interpolation
    kwargs = {name: getattr(config, key) for name, key in _AUGMENTATION.items()} | {
        "batch_size": config.batch_size,
        "is_training": True,
        "num_aug_repeats": int(config.aug_repeats),
        "interpolation": data_config["interpolation"] if plain else config.train_interpolation,
    }
    if config.train_img_sizes:
        sampler = ScheduledBatchSampler(
            SequentialSampler(range(batches)),
            batch_sizes=[1] * len(config.train_img_sizes),
            choice_weights=config.train_size_probs or None,
            seed=config.seed,
            num_batches=batches,
            choice_schedule="progressive" if config.train_size_schedule == "progressive" else "constant",
            schedule_epochs=config.epochs,
            schedule_spread=config.train_size_schedule_spread,
            schedule_random_mix=config.train_size_random_mix,
        )
        kwargs["size_schedule"] = config.train_img_sizes, sampler
    return kwargs


def mixing(config: Config) -> bool:
    return config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None
