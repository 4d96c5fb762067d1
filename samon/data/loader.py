"""`create_dataset` and `create_loader`: timm's arguments, our streams, timm's transforms and device prefetcher."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm.data
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, default_collate, get_worker_info
from torchvision import transforms
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from samon import rng
from samon.data.corrupt import DataError, WorkerError, explain_worker_error
from samon.data.decode import choose_decoder, decode_pil
from samon.data.sources import ShardSource, open_source
from samon.data.stream import IndexedStream, SampleStream, ShardStream, SizedTransform, SizeSchedule, sample_seed
from samon.errors import UserError

GREY = 128  # fills what AutoAugment moves in from outside, as in the paper's public code


def padding(size: int) -> int:
    """Pixels to pad each side with before the random crop: an eighth of the image, 4 for CIFAR's 32."""
    return max(1, size // 8)


def create_transform(
    input_size: int | tuple[int, int] | tuple[int, int, int], *, is_training: bool = False, **kwargs: Any
) -> Any:
    """timm's `create_transform`, which also knows `train_crop_mode='pad'` and `auto_augment='cifar10'`.

    The pad crop stands where timm's random crop does (an image of another size is resized first), the policy
    behind the flips, in place of colour jitter as with timm's own policies.
    """
    pad, policy = kwargs.get("train_crop_mode") == "pad", kwargs.get("auto_augment") == "cifar10"
    if not is_training or kwargs.get("no_aug") or not (pad or policy):
        made = timm.data.create_transform(input_size, is_training=is_training, **kwargs)
        first = (made[0] if isinstance(made, tuple) else made).transforms[0]
        if isinstance(first, RandomResizedCropAndInterpolation):
            first.get_params = partial(_whole_pixels, first.get_params)  # type: ignore[method-assign]
        return made
    if kwargs.get("separate"):
        raise UserError("--train-crop-mode pad and --aa cifar10 do not go with --aug-splits")
    kwargs |= {"train_crop_mode": None} if pad else {}
    kwargs |= {"auto_augment": None, "color_jitter": None} if policy else {}
    steps = timm.data.create_transform(input_size, is_training=True, **kwargs).transforms
    size = steps[0].size
    if pad:
        resize = transforms.Resize(size, InterpolationMode.BICUBIC)
        steps[:1] = [resize, transforms.RandomCrop(size, padding=padding(min(size)))]
    if policy:
        flips = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
        behind = max((i for i, step in enumerate(steps) if isinstance(step, flips)), default=1 if pad else 0)
        steps.insert(behind + 1, AutoAugment(AutoAugmentPolicy.CIFAR10, fill=GREY))
    return transforms.Compose(steps)


def _whole_pixels(get_params: Callable[..., tuple[int, ...]], image: Any, *ranges: Any) -> tuple[int, ...]:
    """timm's random box, at least 1 pixel wide and high: of thin images a small share can round to none."""
    top, left, height, width = get_params(image, *ranges)
    if height == 0:  # then top may be just below the image
        top, height = max(top - 1, 0), 1
    if width == 0:
        left, width = max(left - 1, 0), 1
    return top, left, height, width


@dataclass
class Draws:
    """One epoch's decisions, first axis the sample index of the whole data set."""

    order: Tensor  # [N] permutation
    corner: Tensor  # [N, 2] top and left corner of the crop in the padded image
    flip: Tensor  # [N] bool
    policy: Tensor  # [N] AutoAugment sub-policy
    chance: Tensor  # [N, 2] uniform numbers that decide whether each operation is applied
    negative: Tensor  # [N, 2] bool, direction of signed operations


class Augment:
    """Pad-and-crop, flip and AutoAugment of uint8 batches [B, C, H, W], all on the batch's device."""

    def __init__(self, size: tuple[int, int], hflip: float = 0.5, policy: bool = False) -> None:
        self.size, self.hflip, self.pad = size, hflip, padding(min(size))
        self.auto = AutoAugment(AutoAugmentPolicy.CIFAR10) if policy else None

    def draw(self, count: int, seed: int, epoch: int) -> Draws:
        """All decisions of an epoch for `count` samples."""
        g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        return Draws(
            order=torch.randperm(count, generator=g),
            corner=torch.randint(2 * self.pad + 1, (count, 2), generator=g),
            flip=torch.rand(count, generator=g) < self.hflip,
            policy=torch.randint(25, (count,), generator=g),
            chance=torch.rand(count, 2, generator=g),
            negative=torch.randint(2, (count, 2), generator=g).bool(),
        )

    def __call__(self, images: Tensor, index: Tensor, draws: Draws) -> Tensor:
        """uint8 [B, C, H, W] of the samples `index` [B] (on the CPU) -> the same shape, augmented."""
        device = images.device
        images = self._crop(images, draws.corner[index].to(device, non_blocking=True))
        flip = draws.flip[index].to(device, non_blocking=True)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        if self.auto is not None:
            for step in (0, 1):
                self._auto(images, step, index, draws)
        return images

    def _crop(self, images: Tensor, corner: Tensor) -> Tensor:
        height, width = self.size
        windows = F.pad(images, (self.pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view, by corner
        batch = torch.arange(len(images), device=images.device)
        return windows[batch, :, corner[:, 0], corner[:, 1]].contiguous()  # [B, C, H, W]

    def _auto(self, images: Tensor, step: int, index: Tensor, draws: Draws) -> None:
        """Apply each sample's operation number `step` in place, one call per operation, strength and direction."""
        assert self.auto is not None
        space = self.auto._augmentation_space(10, self.size)
        fill = [float(GREY)] * images.shape[1]
        groups: dict[tuple[str, float], list[int]] = {}
        drawn = (draws.policy[index], draws.chance[index, step], draws.negative[index, step])
        picks = zip(*(values.tolist() for values in drawn), strict=True)
        for row, (policy, chance, negative) in enumerate(picks):
            name, probability, level = self.auto.policies[policy][step]
            if chance <= probability:
                magnitudes, signed = space[name]
                size = float(magnitudes[level]) if level is not None else 0.0
                groups.setdefault((name, -size if signed and negative else size), []).append(row)
        for (name, magnitude), rows in groups.items():
            where = torch.tensor(rows, device=images.device)
            images[where] = _apply_op(images[where], name, magnitude, InterpolationMode.NEAREST, fill)


_logger = logging.getLogger(__name__)


def create_dataset(
    name: str,
    root: str | None = None,
    split: str = "validation",
    *,
    is_training: bool = False,
    batch_size: int = 1,
    seed: int = 42,
    input_img_mode: str = "RGB",
    num_samples: int | None = None,
    num_classes: int | None = None,
    repeats: float = 0,
    sample_split: bool = False,
    shuffle_buffer: int = 2048,
    max_corrupt_fraction: float = 0.001,
    rank: int | None = None,
    world_size: int | None = None,
    **opening: Any,
) -> SampleStream:
    """The samples of a split, as this rank reads them; timm's arguments and names, and:

    Args:
        num_classes: labels must lie below it (default: what `_info.json` says).
        num_samples: an epoch has so many samples, whatever the split holds (evaluation: no more than it holds).
        repeats: an epoch is so many passes over the split; below 1 it is one.
        sample_split: allow fewer shards than processes x workers.
        shuffle_buffer: encoded samples each worker holds for shuffling shards.
        max_corrupt_fraction: of an epoch's training samples may be bad; evaluation stops at the first.
        rank, world_size: default to torch.distributed's.
        **opening: timm's class_map, input_key, target_key, download and trust_remote_code; for remote shards
            shard_cache, a directory for copies, shard_cache_size, their bytes at most (200 GiB), and allow_shell_urls,
            which allows `pipe:` URLs.

    Raises:
        UserError: no such data, or numbers that cannot work.
    """
    if rank is None or world_size is None:
        grouped = dist.is_available() and dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    source = open_source(name, root, split, num_classes=num_classes, **opening)
    held = len(source)
    if num_samples and not is_training and num_samples > held:
        raise UserError(f"{num_samples} evaluation samples asked for, the split holds {held}")
    size = num_samples or (int(held * max(1, repeats)) if is_training else held)
    common: dict[str, Any] = {"is_training": is_training, "batch_size": batch_size, "seed": seed, "rank": rank}
    common |= {"world_size": world_size, "max_corrupt_fraction": max_corrupt_fraction, "image_mode": input_img_mode}
    common |= {"num_classes": num_classes or source.num_classes, "decode": partial(decode_pil, mode=input_img_mode)}
    if isinstance(source, ShardSource):
        return ShardStream(source, size, **common, buffer=shuffle_buffer, sample_split=sample_split)
    return IndexedStream(source, size, **common)


class SeededErasing:
    """timm's random erasing, each batch with a seed of its own.

    It runs in the main process one batch ahead of training, so drawing from the process's generators would make a
    resumed run differ from an uninterrupted one.
    """

    def __init__(self, erasing: Callable[[Tensor], Tensor], stream: SampleStream, device: torch.device) -> None:
        self.erasing, self.stream, self.device = erasing, stream, device
        self.batch = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Erase in place, [B, C, H, W]."""
        seed = sample_seed(self.stream.seed, int(self.stream.state[0]), self.batch, self.stream.rank, 1)
        self.batch += 1
        with rng.fork(self.device):
            rng.seed(seed, self.device)
            return self.erasing(images)


class SplitTransform:
    """AugMix's input: the clean image and ``count`` - 1 augmented ones, from timm's three-part transform."""

    def __init__(self, parts: tuple[Any, Any, Any], count: int) -> None:
        self.parts, self.count = parts, count

    def __call__(self, image: Any) -> tuple[Any, ...]:
        """One image to ``count`` images."""
        base, augment, final = self.parts
        image = base(image)
        return (final(image), *(final(augment(image)) for _ in range(self.count - 1)))


def leave_signals_to_trainer(_: int) -> None:
    """Workers outlive signals sent to the whole process group: the trainer finishes its step, then ends them."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # seen by the thread below alone
    threading.Thread(target=_end_when_trainer_says, args=(os.getppid(),), daemon=True).start()


def _end_when_trainer_says(trainer: int) -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == trainer:
            os._exit(0)


class SharedMemoryCollate:
    """A collate function that moves a worker's batch to shared memory.

    PyTorch does so later, in a thread of the worker, where too little shared memory is an error that reaches nobody:
    the main process would wait for the batch for ever.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Any) -> Any:
        batch = self.collate(samples)
        return batch if get_worker_info() is None else tree_map_only(Tensor, Tensor.share_memory_, batch)


class _Batches(DataLoader):
    """The data loader; without workers it runs in this process, whose generators it must not disturb."""

    iterator: Any = None

    def __iter__(self) -> Any:
        before = signal.getsignal(signal.SIGCHLD)
        try:
            self.iterator = iterator = super().__iter__()
            if signal.getsignal(signal.SIGCHLD) is not before:
                # PyTorch's handler raises wherever the main thread is when a worker dies, also within an update;
                # without it the death is noticed when the next batch is due.
                signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
            while True:
                with nullcontext() if self.num_workers else rng.fork():
                    batch = next(iterator, None)
                if batch is None:
                    return
                yield batch
        except Exception:
            self.close()  # the error's traceback would keep them alive
            raise

    def close(self) -> None:
        """End living workers now.

        If it is left to the garbage collector, which may run in the very thread that has to tell the workers to
        end, that thread waits for them until their time is up.
        """
        iterator, self.iterator, self._iterator = self.iterator, None, None
        if iterator is not None and self.num_workers:
            iterator._shutdown_workers()


class Loader:
    """Batches (input, target) on the device; see `create_loader`."""

    def __init__(self, stream: SampleStream, batches: Any, device: torch.device) -> None:
        self.dataset, self.batches, self.device = stream, batches, device
        self.worker_error: WorkerError | None = None  # why workers had to be started again
        erasing = getattr(batches, "random_erasing", None)
        self.erasing = batches.random_erasing = SeededErasing(erasing, stream, device) if erasing else None

    def __len__(self) -> int:
        """Batches that this process gives in a whole epoch."""
        return self.dataset.stretch(0, 1).batches

    @property
    def num_samples(self) -> int:
        """Samples of an epoch over all ranks (training drops what fills no whole batch on every rank)."""
        return self.dataset.size

    @property
    def corrupt_samples(self) -> int:
        """Bad samples that this process skipped so far."""
        return self.dataset.faults.total

    @property
    def mixup_enabled(self) -> bool:
        """Whether the collate function mixes samples; setting it takes effect at the next epoch, also in workers."""
        return hasattr(self.dataset.collate, "mixup_enabled") and bool(self.dataset.state[2])

    @mixup_enabled.setter
    def mixup_enabled(self, value: bool) -> None:
        self.dataset.state[2] = int(value)

    def close(self) -> None:
        """End the loader's workers; iterating again starts new ones."""
        inner: Any = self.batches.loader if isinstance(self.batches, PrefetchLoader) else self.batches
        inner.close()

    def set_epoch(self, epoch: int, samples_consumed: int = 0) -> None:
        """Say what the next iteration gives: this epoch, without the samples already used on all ranks together."""
        per_step = self.dataset.batch_size * self.dataset.world_size
        first, rest = divmod(samples_consumed, per_step)
        if rest:
            used = f"{samples_consumed} samples of epoch {epoch} were used, no whole number of steps of {per_step}"
            _logger.warning("%s: the last %d of them come again", used, rest)
        self.dataset.set_epoch(epoch, first)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first, given, steps = int(self.dataset.state[1]), 0, 0
        for attempt in range(2):  # new workers continue at the next batch, so that the update can be finished
            if self.erasing is not None:
                self.erasing.batch = int(self.dataset.state[1])
            try:
                for images, target in self.batches:
                    given, steps = given + len(target), steps + 1
                    yield images.to(self.device, non_blocking=True), target.to(self.device, non_blocking=True)
                break
            except (RuntimeError, OSError, UserError) as error:
                reason = explain_worker_error(error)
                if attempt or not isinstance(reason, WorkerError):
                    raise reason from None
                self.worker_error = reason
                self.dataset.state[1] = first + steps
        if not self.dataset.is_training:
            self.dataset.state[1] = first
        if not self.dataset.is_training and given != len(self.dataset):
            raise DataError(f"evaluated {given} samples where the index promises {len(self.dataset)}")


def create_loader(
    dataset: SampleStream,
    input_size: int | tuple[int, int] | tuple[int, int, int],
    batch_size: int,
    is_training: bool = False,
    *,
    re_prob: float = 0.0,
    re_mode: str = "const",
    re_count: int = 1,
    re_split: bool = False,
    num_aug_repeats: int = 0,
    num_aug_splits: int = 0,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    num_workers: int = 1,
    distributed: bool = False,
    collate_fn: Callable[..., Any] | None = None,
    pin_memory: bool = False,
    fp16: bool = False,
    img_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    use_prefetcher: bool = True,
    use_multi_epochs_loader: bool = False,
    persistent_workers: bool = True,
    worker_seeding: str = "all",
    decoder: str = "auto",
    size_schedule: SizeSchedule | None = None,
    **transform: Any,
) -> Loader:
    """timm's `create_loader` for a stream of `create_dataset`; the arguments are timm's, plus ``decoder``.

    ``size_schedule`` gives each training batch one of several sizes. ``distributed``, ``worker_seeding`` and
    ``use_multi_epochs_loader`` change nothing here: the stream knows its rank, every sample has its own seed, and
    workers always live on.

    Raises:
        UserError: numbers that cannot work, or a transform that ``decoder`` cannot do.
    """
    device = torch.device(device)
    erasing: dict[str, Any] = {"re_prob": re_prob, "re_mode": re_mode, "re_count": re_count, "mean": mean, "std": std}
    erasing["re_num_splits"] = (num_aug_splits or 2) if re_split else 0
    transform |= {"is_training": is_training, "use_prefetcher": use_prefetcher, **erasing}
    _set_transform(dataset, decoder, input_size, size_schedule, num_aug_splits, transform)
    dataset.batch_size, dataset.repeats = batch_size, num_aug_repeats
    dataset.collate = collate_fn or (fast_collate if use_prefetcher else default_collate)
    dataset.set_loader_cfg(num_workers)
    workers: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": persistent_workers and num_workers > 0}
    workers |= {"pin_memory": pin_memory and device.type == "cuda", "drop_last": is_training}
    workers |= {"collate_fn": SharedMemoryCollate(dataset.collate), "worker_init_fn": leave_signals_to_trainer}
    # The generator: its base seed would be drawn from the global one.
    batches: Any = _Batches(dataset, batch_size, generator=torch.Generator(), **workers)
    if use_prefetcher:
        channels = input_size[0] if isinstance(input_size, (tuple, list)) and len(input_size) == 3 else len(mean)
        erasing |= {"channels": channels, "re_prob": re_prob if is_training else 0.0}
        batches = PrefetchLoader(batches, device=device, fp16=fp16, img_dtype=img_dtype, **erasing)
    return Loader(dataset, batches, device)


def _set_transform(
    dataset: SampleStream, decoder: str, size: Any, schedule: SizeSchedule | None, splits: int, how: dict[str, Any]
) -> None:
    """How images are decoded and augmented, at one size or at each of a schedule's; ``how``: timm's arguments."""

    def made(size: Any, quiet: bool) -> tuple[Any, Any]:
        transform = create_transform(size, separate=splits > 0, **how)
        transform = SplitTransform(transform, splits) if splits else transform
        return choose_decoder(decoder, transform, dataset.image_mode, quiet)

    dataset.decode, dataset.transform = made(size, quiet=not how["is_training"])
    if schedule is not None:
        dataset.transform = SizedTransform([made((side, side), quiet=True)[1] for side in schedule.sizes], schedule)
