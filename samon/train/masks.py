"""Sparse masks in training: renewed by epochs, SSAM-F's from images of the training set."""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

from torch import Tensor

from samon import rng
from samon.session.checkpoint import Progress
from samon.step.fisher import fisher_diagonal
from samon.train.build import Run

log = logging.getLogger("samon")


def renew_mask(run: Run, progress: Progress, to_device: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """At the begin of each --mask-epochs-th epoch; a `mask_every` in --opt-kwargs counts steps instead.

    The Fisher diagonal is taken over --fisher-samples images in the order and augmentation of the epoch that begins,
    one by one, in eval mode: BatchNorm has no statistics of a single image. Generators are left as they were.
    """
    sam, config = run.sam, run.config
    if sam is None or sam.mask is None or "mask_every" in config.opt_kwargs:
        return
    if not sam.mask.begin_epoch(progress.epoch, run.epochs, config.mask_epochs):
        return
    share = -(-config.fisher_samples // run.world.size)
    with rng.kept(run.world.device):
        run.model.eval()
        run.train_loader.set_epoch(progress.epoch, 0)
        diagonal = fisher_diagonal(sam, islice(_losses(run, to_device), share))
        run.model.train()
    sam.mask.renew_fisher(diagonal)
    log.info("SSAM-F: the mask is renewed from %d images", share * run.world.size)


def _losses(run: Run, to_device: Callable[..., tuple[Tensor, Tensor]]) -> Iterator[Callable[[], Tensor]]:
    for batch in run.train_loader:
        images, target = to_device(run, *batch)
        yield from (partial(_loss, run, *one) for one in zip(images.split(1), target.split(1), strict=True))


def _loss(run: Run, image: Tensor, target: Tensor) -> Tensor:
    with run.autocast():
        return run.loss(run.model(image), target)
