"""The evaluations of validate.py: each turns (model, data set) into result rows. The same for any process count."""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.data import create_loader
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from samon.errors import UserError
from samon.evals import attacks as adversarial
from samon.evals import feature_rank, norm_params
from samon.evals import shifts as suites
from samon.evals.accuracy import Scoring, score
from samon.evals.results import Row
from samon.evals.sharpness import PRESETS, Measure, sharpness

log = logging.getLogger("samon")


@dataclass
class Target:
    """A model on a device, and this process among the others."""

    args: argparse.Namespace
    model: nn.Module
    data_config: dict[str, Any]  # timm's: input_size, mean, std, interpolation, crop_pct, crop_mode
    device: torch.device
    rank: int
    world: int
    autocast: Callable[[], AbstractContextManager[Any]]

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, on the CPU."""
        values = values.to(self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return values.cpu()


@dataclass
class Entry:
    """One data set to evaluate."""

    name: str
    dataset: str
    root: str
    split: str
    evals: list[str]
    kind: str = ""  # a key of `suites.SETS`, or '' for labels as they are
    mismatch: str = ""  # what differs from the set as published
    scorings: dict[str, Scoring] = field(default_factory=lambda: {"": (None, None)})

    def images(self, args: argparse.Namespace) -> Any:
        """The set opened, and with it `scorings` and `mismatch`."""
        if self.kind:
            images, table, self.mismatch = suites.open_set(self.kind, self.dataset, self.root, self.split)
            self.scorings = dict(suites.scorings(self.kind, table))
            return images
        images = self.plain(args, self.split)
        if args.valid_labels:
            columns = [int(line) for line in Path(args.valid_labels).read_text().split()]
            self.scorings = {"valid labels": (columns, None)}
        if args.real_labels:
            if not isinstance(images, suites.EvalImages):
                raise UserError(f"--real-labels needs image files; --dataset {self.dataset} has none")
            table = suites.real_labels(None if args.real_labels == "real" else args.real_labels)
            self.scorings = {"ReaL": (None, table)}
            images.row_of = lambda _label, name: suites.validation_number(name)
        return images

    def plain(self, args: argparse.Namespace, split: str) -> Any:
        """A split with its labels as they are."""
        return suites.open_images(
            self.dataset,
            self.root,
            split,
            class_map=args.class_map,
            input_key=args.input_key,
            target_key=args.target_key,
            download=args.dataset_download,
            input_img_mode=args.input_img_mode,
            trust_remote_code=args.dataset_trust_remote_code,
            num_classes=args.num_classes,
        )


class Part(Subset):
    """Chosen images, through the transform that the loader sets."""

    transform: Any = None

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, int]]:
        return [(self.transform(image), label) for image, label in super().__getitems__(indices)]


def batches(
    t: Target, images: Dataset, chosen: list[int], size: int, raw: bool = False
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """(number of the batch, its indices in the set, images, labels) of this process's share of ``chosen``.

    ``raw`` leaves the images in [0, 1] instead of normalising them.
    """
    mine = suites.share(chosen, size, t.rank, t.world)
    if not mine:
        return
    c, args = t.data_config, t.args
    mean, std = ((0.0,) * len(c["mean"]), (1.0,) * len(c["std"])) if raw else (c["mean"], c["std"])
    part: Any = Part(images, mine)
    loader = create_loader(
        part,
        c["input_size"],
        size,
        is_training=False,
        interpolation=c["interpolation"],
        mean=mean,
        std=std,
        num_workers=args.workers,
        crop_pct=c["crop_pct"],
        crop_mode=c["crop_mode"],
        crop_border_pixels=args.crop_border_pixels,
        pin_memory=args.pin_mem,
        device=t.device,
        use_prefetcher=not args.no_prefetcher,
        persistent_workers=False,
    )
    try:
        for k, (x, y) in enumerate(loader):
            yield t.rank + k * t.world, torch.tensor(mine[k * size : (k + 1) * size]), x, y
    except UserError as error:  # torch puts a worker's traceback in front of its message
        raise UserError(str(error).splitlines()[-1].removeprefix("samon.errors.UserError: ")) from None


def accuracy_rows(t: Target, entry: Entry) -> list[Row]:
    """top1, top5 and loss under every reading of the set's labels."""
    classes = getattr(t.model, "num_classes", 1000)
    if entry.kind and classes != 1000:
        raise UserError(f"{entry.name}: needs a model of the 1000 ImageNet classes, {t.args.model} has {classes}")
    images = entry.images(t.args)
    chosen = suites.choose(len(images), t.args.num_samples, t.args.seed)
    dtype = next(t.model.parameters()).dtype
    net: Any = t.model
    if t.args.torchcompile:
        net = torch.compile(net, backend=t.args.torchcompile, mode=t.args.torchcompile_mode)
    size = t.args.batch_size
    while True:
        loader = ((x.to(dtype), y) for _, _, x, y in batches(t, images, chosen, size))
        try:
            found = score(
                net,
                loader,
                entry.scorings,
                device=t.device,
                amp_autocast=t.autocast,
                channels_last=t.args.channels_last,
                log=log.info,
                log_every=t.args.log_freq,
            )
            break
        except torch.OutOfMemoryError:
            if not t.args.retry or size == 1 or t.world > 1:
                raise
            size //= 2
            log.warning("out of memory: trying again with --batch-size %d", size)
    rows = []
    for setting, values in found.items():
        n = int(values.pop("num_samples"))
        extra = {"setting": setting} if setting else {}
        if entry.mismatch or (entry.kind == "objectnet" and n != suites.SETS["objectnet"].images):
            extra["mismatch"] = entry.mismatch or f"{n} images, published {suites.SETS['objectnet'].images}"
        rows += [{"metric": key, "value": round(v, 6), "num_samples": n, **extra} for key, v in values.items()]
    return rows


def threats(args: argparse.Namespace) -> list[adversarial.Threat]:
    """Every norm with every radius; where plain and a/255 radii are mixed, plain ones are for l2 alone."""
    norms = [norm.strip().lower() for norm in args.norm.split(",")]
    if set(norms) - {"l2", "linf"}:
        raise UserError(f"--norm {args.norm}: use l2, linf or both, comma-separated")
    found = []
    texts = [text.strip() for text in args.eps.split(",")]
    mixed = len({"/" in text for text in texts}) == 2
    for norm in norms:
        for text in texts:
            above, _, below = text.partition("/")
            try:
                eps = float(above) / float(below or 1)
            except (ValueError, ZeroDivisionError):
                eps = -1.0
            if eps <= 0:
                raise UserError(f"--eps {text!r}: write positive numbers such as 0.25 or 0.25/255")
            if not mixed or ("/" in text) == (norm == "linf"):
                budget = args.apgd_iters, args.apgd_targets, args.apgd_restarts
                found.append(adversarial.Threat(norm, eps, *budget, args.seed))
    if not found:
        raise UserError(f"--eps {args.eps}: no radius fits --norm {args.norm}")
    return found


def apgd_rows(t: Target, entry: Entry) -> list[Row]:
    """Robust accuracy under both attacks, after each of them, for every threat."""
    images = entry.images(t.args)
    columns, table = next(iter(entry.scorings.values()))
    if columns is not None or (table is not None and int(table.sum(1).max()) > 1):
        raise UserError(f"apgd: {entry.name} restricts or multiplies its labels; attack a set with plain ones")
    labels = None if table is None else table.float().argmax(1)
    chosen = suites.choose(len(images), t.args.num_samples, t.args.seed)
    size = t.args.apgd_batch_size
    model = adversarial.Normalized(t.model, t.data_config["mean"], t.data_config["std"]).to(t.device)
    found = threats(t.args)

    def stream() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        count = -(-len(suites.share(chosen, size, t.rank, t.world)) // size)
        for _, index, x, y in tqdm(
            batches(t, images, chosen, size, raw=True), f"apgd {entry.name}", count, disable=t.rank != 0, unit="batch"
        ):
            yield index, x, y if labels is None else labels.to(y.device)[y]

    state = Path(t.args.apgd_state) if t.args.apgd_state else None
    outcomes = adversarial.robust_outcomes(model, stream(), found, device=t.device, state=state)
    rows = []
    for threat, outcome in outcomes.items():
        counts = adversarial.summarize(outcome)
        keys = list(counts)
        clean, *after, n = t.total(torch.tensor(list(counts.values()))).tolist()
        about = {"num_samples": n, "norm": threat.norm, "eps": threat.eps, "clean_top1": 100 * clean / n}
        names = ["robust_top1_" + key.removeprefix("robust_") for key in keys[1:-1]]
        values = dict(zip(names, after, strict=True)) | {"robust_top1": after[-1]}
        rows += [{"metric": key, "value": 100 * value / n, **about} for key, value in values.items()]
    return rows


def sharpness_rows(t: Target, entry: Entry) -> list[Row]:
    """Mean sharpness over batches of m training images, for every measure asked for."""
    args = t.args
    texts = [text for word in args.sharpness for text in PRESETS.get(word, [word])]
    measures = [measure for text in texts for measure in Measure.parse(text)]
    images = entry.plain(args, args.sharpness_split)
    chosen = suites.choose(len(images), args.sharpness_samples, args.seed)
    chosen = chosen[: len(chosen) // args.sharpness_m * args.sharpness_m]
    count = len(chosen) // args.sharpness_m
    if not count:
        raise UserError(
            f"sharpness: {len(images)} images in {entry.name} {args.sharpness_split} are fewer than "
            f"--sharpness-m {args.sharpness_m}"
        )
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(args.seed + 1)).tolist()
    chosen = [chosen[i] for i in order]  # sets lie sorted by class; a batch should not hold one class
    stream = ((number, x, y) for number, _, x, y in batches(t, images, chosen, args.sharpness_m))
    shown = tqdm(stream, f"sharpness {entry.name}", -(-(count - t.rank) // t.world), disable=t.rank != 0)
    found = sharpness(t.model, shown, count, measures, device=t.device, mode=args.sharpness_mode, seed=args.seed)
    rows = []
    for measure, values in found.items():
        value = float(t.total(values).mean())
        about = {"setting": f"{measure} {args.sharpness_mode}", "rho": measure.rho, "m": args.sharpness_m}
        rows.append({"metric": "sharpness", "value": value, "num_samples": len(chosen), **about})
    return [{**row, "split": args.sharpness_split} for row in rows]


def feature_rank_rows(t: Target, entry: Entry) -> list[Row]:
    """Rank of every layer under every centring."""
    args = t.args
    centrings = args.feature_centring.split(",")
    if set(centrings) - set(feature_rank.CENTRINGS):
        raise UserError(f"--feature-centring {args.feature_centring}: use {', '.join(feature_rank.CENTRINGS)}")
    split = args.feature_split or entry.split
    images = entry.plain(args, split)
    chosen = suites.choose(len(images), args.feature_samples, args.seed)
    size = min(args.batch_size, -(-len(chosen) // t.world))
    rows = []
    for layer in args.feature_layer:
        stream = ((torch.arange(k * size, k * size + len(x)), x) for k, _, x, _ in batches(t, images, chosen, size))
        phi = feature_rank.feature_matrix(
            t.model, stream, len(chosen), device=t.device, layer=layer, token=args.feature_token
        )
        if t.world > 1:
            dist.all_reduce(phi)
        for centring in centrings:
            rank = feature_rank.rank_of(feature_rank.energies(phi, centring))
            about = {"layer": layer or "forward_features", "centring": centring, "features": phi.shape[1]}
            setting = {"setting": f"{about['layer']} {centring}-centred", "split": split}
            rows.append({"metric": "feature_rank", "value": rank, "num_samples": len(chosen), **about, **setting})
    return rows


def norm_params_rows(t: Target) -> list[Row]:
    """Statistics of gamma and beta by layer type, over all layers and for each."""
    rows = norm_params.rows(norm_params.values(t.model))
    return [{**row, "setting": f"{row['layer_type']} {row['metric']}"} for row in rows]


RUN: dict[str, Callable[[Target, Entry], list[Row]]] = {
    "accuracy": accuracy_rows,
    "apgd": apgd_rows,
    "sharpness": sharpness_rows,
    "feature_rank": feature_rank_rows,
}


def evaluate(t: Target, entry: Entry, about: Row) -> list[Row]:
    """All of an entry's evaluations as full rows; ``about`` names the model."""
    rows = []
    for name in entry.evals:
        if name == "norm_params":
            continue  # needs no data: once per model, by `norm_params_rows`
        log.info("%s on %s", name, entry.name)
        place = {"dataset": entry.name, "split": entry.split, "eval": name}
        rows += [{**about, **place, **row} for row in RUN[name](t, entry)]
    return rows
