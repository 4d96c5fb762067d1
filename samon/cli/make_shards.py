"""Pack images into WebDataset shards with an `_info.json` that timm reads too; `--verify` checks a finished set.

    samon-shards --source DIR --output DIR                      # DIR/<split>/<class>/<image>
    samon-shards --source DIR --output DIR --format imagenet --val-labels FILE
    samon-shards --verify --output DIR

Images keep their bytes unless --resize is given. Repeat the same command to resume one that was interrupted.
"""

import argparse
import hashlib
import io
import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple, cast

from PIL import Image

from samon.cli.layouts import FORMATS, LabeledImages, find_splits
from samon.data import DataError, SampleError, create_dataset
from samon.data.decode import decode_pil, open_image
from samon.data.images import ImageEntry
from samon.data.sources import ShardSource
from samon.data.stream import SampleStream
from samon.data.urls import import_webdataset
from samon.errors import UserError
from samon.files import atomic_write, write_text
from samon.progress import progress_bar

SHARD_BYTES, MIN_SHARDS = 100_000_000, 16  # default size; the minimum feeds several workers
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}  # others by their format; timm reads jpg, png, webp


class ShardTask(NamedTuple):
    """A shard to write, and its (key, image, label) samples."""

    path: Path
    samples: list[tuple[str, ImageEntry, int]]


def sample_key(path: str, split: str, used: set[str]) -> str:
    """Return `<class>/<name>`, unique and without a dot, at which webdataset would cut it."""
    parts = os.path.splitext(path)[0].replace(".", "_").split("/")[-2:]
    key = "/".join(parts[parts[0] == split :]).lstrip("_") or "image"  # readers skip names like __this__
    unique, number = key, 2
    while unique in used:
        unique, number = f"{key}-{number}", number + 1
    used.add(unique)
    return unique


def encode_image(entry: ImageEntry, resize: int, quality: int) -> tuple[str, bytes]:
    """Return (suffix, bytes) of one image: as stored, or with its shorter edge reduced to `resize`."""
    data = entry.read()
    try:
        image = open_image(data)
        if resize and min(image.size) > resize:
            scale = resize / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            out = io.BytesIO()
            decode_pil(data).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=quality)
            return "jpg", out.getvalue()
    except SampleError as error:
        raise UserError(f"{entry.path}: {error}; remove or repair it") from error
    return SUFFIXES.get(image.format or "", (image.format or "").lower()), data


def write_shard(task: ShardTask, resize: int, quality: int) -> str:
    """Write one shard unless it exists, and return its SHA-256."""
    if not task.path.exists():
        tar_writer = import_webdataset("webdataset.writer").TarWriter
        with atomic_write(task.path) as file, tar_writer(file, encoder=False, mtime=0) as tar:
            for key, entry, label in task.samples:
                suffix, data = encode_image(entry, resize, quality)
                tar.write({"__key__": key, suffix: data, "cls": str(label).encode()})
    return sha256(task.path)


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a file. (`hashlib.file_digest` needs Python 3.11.)"""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def plan_shards(split: str, images: LabeledImages, args: argparse.Namespace) -> list[ShardTask]:
    """Shuffle the split's samples by --seed and divide them into shards of about equal length."""
    order, size = list(images.items), len(images.items)
    random.Random(f"{args.seed} {split}").shuffle(order)
    if args.samples_per_shard:
        bounds = [*range(0, size, args.samples_per_shard), size]
    else:
        total = sum(entry.num_bytes for entry, _ in order)
        count = min(size, max(MIN_SHARDS, -(-total // args.shard_bytes)))
        bounds = [i * size // count for i in range(count + 1)]
    used: set[str] = set()
    samples = [(sample_key(entry.path, split, used), entry, label) for entry, label in order]
    digits = max(4, len(str(len(bounds) - 1)))
    paths = (args.output / f"{split}-{i:0{digits}d}.tar" for i in range(len(bounds)))
    return [ShardTask(path, samples[low:high]) for path, (low, high) in zip(paths, pairwise(bounds), strict=False)]


def hash_plan(tasks: dict[str, list[ShardTask]], args: argparse.Namespace) -> str:
    """Return a digest of what an interrupted conversion must have in common with the one that resumes it."""
    digest = hashlib.sha256(f"{args.resize} {args.quality}".encode())
    for path, samples in chain.from_iterable(tasks.values()):
        digest.update(path.name.encode())
        for key, entry, label in samples:
            digest.update(f"{key} {entry.num_bytes} {label}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def check_output(output: Path, names: list[str], tasks: dict[str, list[ShardTask]], digest: str) -> dict[str, object]:
    """Return the splits that the directory's `_info.json` lists so far.

    Raises:
        UserError: the directory has files of another conversion.
    """
    info_path, unfinished = output / "_info.json", output / "_unfinished.json"
    info = json.loads(info_path.read_text()) if info_path.is_file() else {}
    if existing := sorted(set(tasks) & set(info.get("splits", {}))):
        raise UserError(f"{info_path}: has split {', '.join(existing)} already; choose another --output or remove it")
    if info and info.get("class_names") != names:
        raise UserError(f"{info_path}: its splits have other classes; choose another --output")
    if not unfinished.is_file():
        shards = [path.name for path, _ in chain.from_iterable(tasks.values()) if path.exists()]
        if shards:
            raise UserError(f"{output}: {shards[0]} exists already; choose another --output")
    elif unfinished.read_text() != digest:
        what = "another conversion was interrupted here"
        raise UserError(f"{unfinished}: {what}; repeat its command or empty the directory")
    return info.get("splits", {})


def convert(args: argparse.Namespace) -> None:
    """Write the shards in parallel, and at the end the `_info.json` that makes the set readable."""
    splits = find_splits(args)
    class_names = next(iter(splits.values())).class_names
    tasks = {split: plan_shards(split, images, args) for split, images in splits.items()}
    digest = hash_plan(tasks, args)
    entries = check_output(args.output, class_names, tasks, digest)
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / "_unfinished.json", digest)
    write = partial(write_shard, resize=args.resize, quality=args.quality)
    with ThreadPoolExecutor(args.workers) as pool:  # files, Pillow and SHA-256 release the interpreter lock
        for split, shards in tasks.items():
            digests = list(progress_bar(split, len(shards), "shard", pool.map(write, shards)))
            entries[split] = {
                "name": split,
                "num_samples": sum(len(task.samples) for task in shards),
                "filenames": [task.path.name for task in shards],
                "shard_lengths": [len(task.samples) for task in shards],
                "sha256": digests,
            }
    info = {"name": args.output.resolve().name, "num_classes": len(class_names), "class_names": class_names}
    write_text(args.output / "_info.json", json.dumps(info | {"splits": entries}, indent=1) + "\n")
    (args.output / "_unfinished.json").unlink()
    summary = [f"{split} {len(images.items)} images in {len(tasks[split])} shards" for split, images in splits.items()]
    print(f"{args.output}: {', '.join(summary)}")


def find_faults(stream: SampleStream, shard: int, digest: str | None) -> list[str]:
    """Return what is wrong with one shard: its checksum, images that cannot be decoded, labels that are not classes."""
    source = cast(ShardSource, stream.source)
    url, length = source.shards.urls[shard], source.shards.lengths[shard]
    faults = [f"{url}: its SHA-256 is not the one in _info.json"] if digest and sha256(Path(url)) != digest else []
    try:
        for _, sample in source.read_shard(shard, range(length)):
            try:
                stream.process(sample)
            except DataError as error:
                faults.append(str(error))
    except UserError as error:
        faults.append(str(error))
    return faults


def verify(args: argparse.Namespace) -> None:
    """Decode every image of a finished set; compare counts, labels and checksums with `_info.json`."""
    path = args.output / "_info.json"
    if not path.is_file():
        raise UserError(f"{path}: not found; the conversion is not finished")
    faults: list[str] = []
    with ThreadPoolExecutor(args.workers) as pool:
        for split, entry in json.loads(path.read_text())["splits"].items():
            find = partial(find_faults, create_dataset("wds/", str(args.output), split))
            count = len(entry["filenames"])
            digests = [*entry.get("sha256", ()), *[None] * count]
            results = progress_bar(split, count, "shard", pool.map(find, range(count), digests))
            split_faults = list(chain.from_iterable(results))
            print(f"{split}: {entry['num_samples']} images, {len(split_faults)} faults")
            faults += split_faults
    for line in faults[:20]:
        print(line, file=sys.stderr)
    if faults:
        raise UserError(f"{args.output}: {len(faults)} faults, the first: {faults[0]}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, help="directory, uncompressed tar or .npz")
    add("--output", type=Path, required=True, help="directory of the shards")
    add("--format", choices=FORMATS, default="folder", help="layout of the source (default %(default)s)")
    add("--split", help="name of the only split in the source")
    add("--input-key", help="endings of the images, such as '.jpg;.webp' (default: .jpg, .jpeg and .png)")
    add("--val-labels", type=Path, help="labels of ImageNet's flat validation images")
    add("--samples-per-shard", type=int, default=0, help="samples in each shard except the last")
    shard_bytes = f"size of a shard, with at least {MIN_SHARDS} shards (default %(default)s)"
    add("--shard-bytes", type=int, default=SHARD_BYTES, help=shard_bytes)
    add("--resize", type=int, default=0, help="downscale images whose shorter side exceeds this many pixels")
    add("--quality", type=int, default=95, help="JPEG quality for --resize (default %(default)s)")
    add("--seed", type=int, default=0, help="of the samples' order (default %(default)s)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads (default: all cores)")
    add("--verify", action="store_true", help="check a finished set instead of writing one")
    args = parser.parse_args(argv)
    if args.samples_per_shard < 0 or args.shard_bytes < 1 or args.workers < 1 or args.resize < 0:
        raise UserError("--samples-per-shard, --resize, --shard-bytes and --workers must be positive")
    if not args.verify and args.source is None:
        raise UserError("--source is missing: the images to pack")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    verify(args) if args.verify else convert(args)
