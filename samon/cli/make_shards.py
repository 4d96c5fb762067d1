#!/usr/bin/env python3
"""Pack images into WebDataset shards with an `_info.json` that timm reads too; `--verify` checks a finished set.

    samon-shards --source DIR --output DIR                      # DIR/<split>/<class>/<image>
    samon-shards --source DIR --output DIR --format imagenet --val-labels FILE
    samon-shards --verify --output DIR

Images keep their bytes unless --resize is given. Run the same command again to continue one that was interrupted.
"""

import argparse
import hashlib
import io
import json
import os
import random
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import IO, Any

from PIL import Image

from samon.cli.layouts import Split, find_splits
from samon.cli.program import run_script
from samon.data.corrupt import SampleError
from samon.data.decode import decode_pil, open_image
from samon.data.shards import ShardReader, load_split, open_url
from samon.data.sources import ImageEntry
from samon.errors import UserError
from samon.files import atomic_write, write_text
from samon.progress import progress_bar

FORMATS = ("folder", "imagenet", "cifar", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet")
SHARD_BYTES, MIN_SHARDS = 100_000_000, 16  # default size; and so many at least, to feed several workers
Task = tuple[Path, list[tuple[str, ImageEntry, int]]]  # a shard to write: its (key, image, label) samples
MEMBER_NAMES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}  # others by their format; timm reads jpg, png, webp


def member_key(path: str, split: str, taken: set[str]) -> str:
    """`<class>/<name>`, unique and without a dot, at which webdataset would cut it."""
    parts = os.path.splitext(path)[0].replace(".", "_").split("/")[-2:]
    key = "/".join(parts[parts[0] == split :]).lstrip("_") or "image"  # readers skip names like __this__
    unique, number = key, 2
    while unique in taken:
        unique, number = f"{key}-{number}", number + 1
    taken.add(unique)
    return unique


def prepared(item: ImageEntry, resize: int, quality: int) -> tuple[str, bytes]:
    """(suffix, bytes) of one image: as it is, or its shorter edge resized (never enlarged)."""
    data = item.read()
    try:
        image = open_image(data)
        if resize and min(image.size) > resize:
            scale = resize / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            small = decode_pil(data).resize(size, Image.Resampling.BICUBIC)
            out = io.BytesIO()
            small.save(out, "JPEG", quality=quality)
            return "jpg", out.getvalue()
    except SampleError as error:
        raise UserError(f"{item.path}: {error}; remove or repair it") from error
    return MEMBER_NAMES.get(image.format or "", (image.format or "").lower()), data


def write_shard(task: Task, resize: int, quality: int) -> str:
    """Write one shard unless it is there already; its SHA-256."""
    path, samples = task
    if not path.exists():
        with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for key, item, label in samples:
                suffix, data = prepared(item, resize, quality)
                for name, content in ((f"{key}.{suffix}", data), (f"{key}.cls", str(label).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    with open(path, "rb") as file:
        return sha256(file)


def sha256(file: IO[bytes]) -> str:
    """The hexadecimal digest of what is left to read. (`hashlib.file_digest` begins with Python 3.11.)"""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def shard_tasks(name: str, split: Split, args: argparse.Namespace) -> list[Task]:
    """The split's samples in an order drawn from --seed, cut into shards of about equal length."""
    order, size = list(split.items), len(split.items)
    random.Random(f"{args.seed} {name}").shuffle(order)
    if args.samples_per_shard:
        bounds = [*range(0, size, args.samples_per_shard), size]
    else:
        total = sum(item.nbytes for item, _ in order)
        count = min(size, max(MIN_SHARDS, -(-total // args.shard_bytes)))
        bounds = [i * size // count for i in range(count + 1)]
    taken: set[str] = set()
    keyed = [(member_key(item.path, name, taken), item, label) for item, label in order]
    digits = max(4, len(str(len(bounds) - 1)))
    parts = enumerate(pairwise(bounds))
    return [(args.output / f"{name}-{i:0{digits}d}.tar", keyed[low:high]) for i, (low, high) in parts]


def digest_of(tasks: dict[str, list[Task]], args: argparse.Namespace) -> str:
    """What an interrupted conversion must have in common with the one that continues it."""
    digest = hashlib.sha256(f"{args.resize} {args.quality}".encode())
    for path, samples in chain.from_iterable(tasks.values()):
        digest.update(path.name.encode())
        for key, item, label in samples:
            digest.update(f"{key} {item.nbytes} {label}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def may_write(output: Path, splits: dict[str, Split], tasks: dict[str, list[Task]], digest: str) -> dict[str, Any]:
    """What the directory's `_info.json` says so far, refusing to touch what another conversion made."""
    info_path, unfinished = output / "_info.json", output / "_unfinished.json"
    info: dict[str, Any] = json.loads(info_path.read_text()) if info_path.is_file() else {}
    there = sorted(set(splits) & set(info.get("splits", {})))
    if there:
        raise UserError(f"{info_path}: has split {', '.join(there)} already; choose another --output or remove it")
    continued = unfinished.is_file() and unfinished.read_text() == digest
    if unfinished.is_file() and not continued:
        what = "another conversion was interrupted here"
        raise UserError(f"{unfinished}: {what}; repeat its command or empty the directory")
    present = [path.name for path, _ in chain.from_iterable(tasks.values()) if path.exists()]
    if present and not continued:
        raise UserError(f"{output}: {present[0]} exists already; choose another --output")
    if info and info.get("class_names") != next(iter(splits.values())).class_names:
        raise UserError(f"{info_path}: its splits have other classes; choose another --output")
    return info


def convert(args: argparse.Namespace) -> None:
    """Find, plan, write in parallel, and only at the end the `_info.json` that makes the set readable."""
    splits = find_splits(args)
    tasks = {name: shard_tasks(name, split, args) for name, split in splits.items()}
    digest = digest_of(tasks, args)
    written = may_write(args.output, splits, tasks, digest).get("splits", {})
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / "_unfinished.json", digest)
    job = partial(write_shard, resize=args.resize, quality=args.quality)
    with ThreadPoolExecutor(args.workers) as pool:  # files, Pillow and SHA-256 all let other threads run
        for name, parts in tasks.items():
            sums = list(progress_bar(name, len(parts), "shard", pool.map(job, parts)))
            files, lengths = [path.name for path, _ in parts], [len(samples) for _, samples in parts]
            entry = {"name": name, "num_samples": sum(lengths), "filenames": files, "shard_lengths": lengths}
            written[name] = entry | {"sha256": sums}
    names = next(iter(splits.values())).class_names
    info = {"name": args.output.resolve().name, "num_classes": len(names), "class_names": names, "splits": written}
    write_text(args.output / "_info.json", json.dumps(info, indent=1) + "\n")
    (args.output / "_unfinished.json").unlink()
    made = [f"{name} {len(split.items)} images in {len(tasks[name])} shards" for name, split in splits.items()]
    print(f"{args.output}: {', '.join(made)}")


def verify_shard(task: tuple[str, int, str | None, int | None]) -> tuple[int, list[str]]:
    """(images decoded, faults) of one shard."""
    url, length, digest, classes = task
    faults: list[str] = []
    if digest:
        with open_url(url) as file:
            if sha256(file) != digest:
                faults.append(f"{url}: its SHA-256 is not the one in _info.json")
    good = 0
    try:
        for _, record in ShardReader(None, None).read(url, length, range(length)):
            try:
                if isinstance(record, SampleError):
                    raise record
                decode_pil(record.image)
                if not 0 <= record.label < (classes or record.label + 1):
                    raise SampleError(f"label {record.label} of {classes} classes")
                good += 1
            except SampleError as error:
                where = "" if isinstance(record, SampleError) else f"{record.where}: "
                faults.append(f"{where}{type(error).__name__}: {error}")
    except UserError as error:
        faults.append(str(error))
    return good, faults


def verify(args: argparse.Namespace) -> None:
    """Decode every image of a finished set; compare counts, labels and checksums with `_info.json`."""
    path = args.output / "_info.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; the conversion is not finished")
    entries = json.loads(path.read_text())["splits"]
    faults: list[str] = []
    with ThreadPoolExecutor(args.workers) as pool:
        for name, entry in entries.items():
            shards = load_split(str(args.output), name)
            sums = entry.get("sha256") or [None] * len(shards.urls)
            tasks = [(*each, shards.num_classes) for each in zip(shards.urls, shards.lengths, sums, strict=True)]
            results = list(progress_bar(name, len(tasks), "shard", pool.map(verify_shard, tasks)))
            found = [fault for _, some in results for fault in some]
            good = sum(decoded for decoded, _ in results)
            print(f"{name}: {good} of {entry['num_samples']} images good, {len(found)} faults")
            faults += found
    for line in faults[:20]:
        print(line, file=sys.stderr)
    if faults:
        raise UserError(f"{args.output}: {len(faults)} faults, the first: {faults[0]}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, number = parser.add_argument, partial(parser.add_argument, type=int)
    least = f"size of a shard, but {MIN_SHARDS} shards at least (default %(default)s)"
    add("--source", type=Path, help="directory, plain tar or .npz")
    add("--output", type=Path, required=True, help="directory of the shards")
    add("--format", choices=FORMATS, default="folder", help="layout of the source (default folder)")
    add("--split", help="name of the one split in the source")
    add("--val-labels", type=Path, help="labels of ImageNet's flat validation images")
    number("--samples-per-shard", default=0, help="samples in each shard but the last")
    number("--shard-bytes", default=SHARD_BYTES, help=least)
    number("--resize", default=0, help="re-encode images with a longer shorter edge to this")
    number("--quality", default=95, help="JPEG quality for --resize (default %(default)s)")
    number("--seed", default=0, help="of the samples' order (default %(default)s)")
    number("--workers", default=os.cpu_count() or 1, help="threads (default: all cores)")
    add("--verify", action="store_true", help="check a finished set instead of writing one")
    args = parser.parse_args(argv)
    if args.samples_per_shard < 0 or args.shard_bytes < 1 or args.workers < 1 or args.resize < 0:
        raise UserError("--samples-per-shard, --resize, --shard-bytes and --workers must be positive")
    if not args.verify and args.source is None:
        raise UserError("--source is missing: what to pack?")
    return args


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, convert or verify."""
    args = arguments(argv)
    verify(args) if args.verify else convert(args)


if __name__ == "__main__":
    run_script(main)
