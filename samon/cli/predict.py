"""What a model says of images: the likeliest classes of each file, as CSV.

    samon-predict photos/ --checkpoint output/train/RUN -o predictions.csv
    samon-predict cat.jpg dog.jpg --model resnet50.a1_in1k --pretrained --topk 1

Columns: file, then label_k and probability_k for k = 1 (likeliest) to --topk, empty for a damaged file. Labels are the
class folders' names that the run was trained on, ImageNet's descriptions for models of its classes, or else numbers.
Images are prepared as samon-validate prepares them; further flags of samon-validate go after --.
"""

import argparse
import csv
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers.img_extensions import get_img_extensions

from samon.cli.program import parse_before_dashes, run_script
from samon.data.corrupt import ImageError, SampleError
from samon.data.shards import RawSample, is_hidden
from samon.data.sources import Source
from samon.errors import UserError
from samon.evals.entry import EvalImages, Target, batches, evaluating, predict
from samon.evals.main import build, parse
from samon.files import check_writable, name_write_errors
from samon.trainer.distributed import distributed_session

log = logging.getLogger("samon")


class Files(Source):
    """Image files, without labels."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> list[RawSample | SampleError]:
        """Each file's bytes."""
        return [self._read(self.paths[index]) for index in indices]

    def _read(self, path: Path) -> RawSample | SampleError:
        try:
            return RawSample(str(path), path.read_bytes(), 0)
        except OSError as error:
            return ImageError(f"{path}: {error.strerror}")


class TolerantImages(EvalImages):
    """Images of which a damaged one is logged and comes as a black one with label -1."""

    def load(self, record: RawSample | SampleError) -> tuple[Any, int]:
        """The transformed image and 0, or -1 if it is damaged."""
        try:
            return self.decode(record)
        except SampleError as error:
            log.warning("%s", error)
            black = Image.new(self.img_mode, (64, 64))
            return black if self.transform is None else self.transform(black), -1


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and the images anywhere below the directories named, in order, without hidden ones.

    Raises:
        UserError: a path that is not there, or no image at all.
    """
    endings, found = set(get_img_extensions()), []
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
            visible = [file for file in files if not is_hidden(str(file.relative_to(path)))]
            if len(visible) < len(files):
                log.warning("%s: %d hidden files are left out", path, len(files) - len(visible))
            found += visible
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or directory")
    if not found:
        raise UserError(f"no images below {', '.join(map(str, paths))}; endings known are {', '.join(sorted(endings))}")
    return found


def class_labels(target: Target) -> list[str]:
    """What the model's outputs are called."""
    count = int(target.model.num_classes)  # type: ignore[arg-type]
    if target.class_names and len(target.class_names) == count:
        return target.class_names
    if count == 1000:
        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(index) for index in range(count)]
    return [str(index) for index in range(count)]


@torch.no_grad()
def predictions(target: Target, paths: Sequence[Path], topk: int) -> Iterator[list[str]]:
    """A row for each file, as soon as it is known: file, label, probability, label, ...; empty cells if damaged."""
    config, labels = target.config, class_labels(target)
    mode = config.input_img_mode or ("RGB" if target.data_config["input_size"][0] == 3 else "L")
    images = TolerantImages(Files(paths), mode, config.crop_border_pixels or 0)
    with evaluating(target.model):
        for _, indices, x, y in batches(target, images, list(range(len(paths))), config.batch_size, bar="predicting"):
            with target.autocast():
                logits = predict(target.model, x)
            best = logits.float().softmax(1).topk(topk, dim=1)
            found = zip(indices.tolist(), y.tolist(), best.values.tolist(), best.indices.tolist(), strict=True)
            for index, label, shares, classes in found:
                pairs = zip(classes, shares, strict=True)
                cells = [text for c, p in pairs for text in (labels[c], f"{p:.6f}")]
                yield [str(paths[index]), *(cells if label >= 0 else [""] * len(cells))]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="samon-predict", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGES", help="files, or directories to search for images")
    add("--checkpoint", default="", help="run directory or checkpoint")
    add("--model", default="", help="timm model, where the checkpoint does not say it")
    add("--pretrained", action="store_true", help="timm's weights instead of a checkpoint")
    add("--topk", type=int, default=5, help="classes to name for each image (default %(default)s)")
    add("-o", "--output", type=Path, help="CSV file to write (default: standard output)")
    args = parse_before_dashes(parser, argv, "samon-validate")
    if not args.checkpoint and not (args.model and args.pretrained):
        raise UserError("no weights: give --checkpoint RUN, or --model NAME --pretrained")
    if args.topk < 1:
        raise UserError(f"--topk must be at least 1, got {args.topk}")
    if args.output:
        check_writable("--output", args.output)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    paths = image_files(args.images)
    given = {"--checkpoint": args.checkpoint, "--model": args.model}
    words = [word for flag, value in given.items() if value for word in (flag, value)]
    words += ["--pretrained"] * args.pretrained
    (job,) = parse([*words, *args.after, "--dataset", "", "--data-dir", "."])  # no data set is read
    with distributed_session(job.config) as world:
        if world.size > 1:
            raise UserError("predictions are made by one process; start it without torchrun")
        target, damaged = build(job, world), 0
        topk = min(args.topk, int(target.model.num_classes))  # type: ignore[arg-type]
        # Row by row, and names that are not UTF-8 with their bytes, so that nothing costs the rows before it.
        output: Any = nullcontext(sys.stdout)
        if args.output:
            output = args.output.open("w", 1, encoding="utf-8", errors="surrogateescape", newline="")
        with name_write_errors(args.output or Path("standard output")), output as file:
            table = csv.writer(file, lineterminator="\n")
            numbers = range(1, topk + 1)
            table.writerow(["file", *(f"{what}_{k}" for k in numbers for what in ("label", "probability"))])
            for row in predictions(target, paths, topk):
                damaged += not row[1]
                table.writerow(row)
    if damaged == len(paths):
        raise UserError(f"no file of {len(paths)} is an image that can be read, such as {paths[0]}")
    if damaged:
        print(f"{damaged} of {len(paths)} files cannot be read: their rows are empty", file=sys.stderr)
    if args.output:
        print(args.output)


if __name__ == "__main__":
    run_script(main)
