"""Predict the classes of images and write them as CSV.

    samon-predict photos/ --checkpoint output/train/RUN -o predictions.csv
    samon-predict cat.jpg dog.jpg --model resnet50.a1_in1k --pretrained --topk 1

Columns: file, then label_k and probability_k for k = 1 (most likely) to --topk, empty for a corrupt file. Labels are
the class folders of the training data, ImageNet's descriptions for models of its classes, or otherwise numbers.
Images are prepared as by samon-validate; further flags of samon-validate go after --.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch
from timm.data import ImageNetInfo

from samon.cli.eval_model import build
from samon.cli.program import parse_before_dashes
from samon.cli.validate import DESCRIPTION, parse
from samon.data.images import ImageEntry, find_images
from samon.data.sources import FileSource
from samon.errors import UserError
from samon.evals.context import EvalContext, EvalDataset, evaluating, load_batches, predict
from samon.files import check_writable, name_write_errors
from samon.trainer.distributed import distributed_session
from samon.trainer.flag_rows import VALIDATE
from samon.trainer.flags import parse_command_line

# Flags of samon-validate that would have no effect here.
_UNUSED = "data data-dir dataset split class-map suite evals num-samples valid-labels real-labels class-report"
_UNUSED += " bootstrap group results-file retry torchcompile"


def list_images(paths: Sequence[Path], input_key: str | None) -> list[ImageEntry]:
    """The files among `paths`, and the images below the directories among them."""
    images = ([ImageEntry(str(path))] if path.is_file() else find_images(path, input_key) for path in paths)
    return list(chain.from_iterable(images))


def output_names(context: EvalContext) -> list[str]:
    """Names of the model's outputs."""
    count, names = context.num_classes, context.class_names or []
    if count == 1000 and not names:
        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(index) for index in range(count)]
    return [*names, *map(str, range(len(names), count))]  # the head may have more outputs than there are classes


@torch.no_grad()
def predict_files(context: EvalContext, files: list[ImageEntry], topk: int) -> Iterator[list[str]]:
    """Yield a row per file: file, label, probability, label, ...; empty cells for a corrupt file."""
    config, names = context.config, output_names(context)
    mode = config.input_img_mode or ("RGB" if context.data_config["input_size"][0] == 3 else "L")
    border, samples = config.crop_border_pixels or 0, list(range(len(files)))
    dtype = next(context.model.parameters()).dtype
    source = FileSource(files, [0] * len(files), "files", slice(None))
    dataset = EvalDataset(source=source, size=len(files), image_mode=mode, border=border, skip_corrupt=True)
    with evaluating(context.model):
        batches = load_batches(context, dataset, samples, config.batch_size, progress="predicting")
        for _, index, images, labels in batches:
            with context.autocast():
                logits = predict(context.model, images.to(dtype))
            top = logits.float().softmax(1).topk(topk, dim=1)
            rows = zip(index.tolist(), labels.tolist(), top.values.tolist(), top.indices.tolist(), strict=True)
            for i, label, probabilities, classes in rows:
                pairs = zip(classes, probabilities, strict=True)
                cells = [text for c, p in pairs for text in (names[c], f"{p:.6f}")]
                yield [files[i].where, *(cells if label >= 0 else [""] * len(cells))]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="samon-predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGES", help="files, or directories to search for images")
    add("--checkpoint", default="", help="run directory or checkpoint")
    add("--model", default="", help="timm model, if the checkpoint does not name it")
    add("--pretrained", action="store_true", help="timm's weights instead of a checkpoint")
    add("--topk", type=int, default=5, help="classes per image (default %(default)s)")
    add("-o", "--output", type=Path, help="CSV file to write (default: standard output)")
    args = parse_before_dashes(parser, argv, "samon-validate")
    if not args.checkpoint and not (args.model and args.pretrained):
        raise UserError("no weights: give --checkpoint RUN, or --model NAME --pretrained")
    given = parse_command_line(VALIDATE, args.after, DESCRIPTION)
    if unused := [flag for flag in _UNUSED.split() if flag.replace("-", "_") in given]:
        raise UserError(f"--{unused[0]} has no effect on samon-predict; drop it")
    if args.topk < 1:
        raise UserError(f"--topk must be at least 1, got {args.topk}")
    if args.output:
        check_writable("--output", args.output)
    args.input_key = given.get("input_key")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    files = list_images(args.images, args.input_key)
    flags = ["--checkpoint", args.checkpoint] * bool(args.checkpoint) + ["--model", args.model] * bool(args.model)
    flags += ["--pretrained"] * args.pretrained + args.after
    job, *others = parse([*flags, "--dataset", "", "--data-dir", "."])  # no data set is read
    if others:
        raise UserError(f"samon-predict needs one model, got {1 + len(others)} such as {job.name} and {others[0].name}")
    with distributed_session(job.config) as dist_info:
        if dist_info.size > 1:
            raise UserError("samon-predict runs in one process; start it without torchrun")
        context, corrupt = build(job, dist_info), 0
        topk = min(args.topk, context.num_classes)
        # Line by line, so that an error keeps the rows before it; any bytes in file names.
        output = args.output.open("w", 1, "utf-8", "surrogateescape", "") if args.output else nullcontext(sys.stdout)
        with name_write_errors(args.output or Path("standard output")), output as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file", *(f"{what}_{k + 1}" for k in range(topk) for what in ("label", "probability"))])
            for row in predict_files(context, files, topk):
                corrupt += not row[1]
                table.writerow(row)
    if corrupt == len(files):
        raise UserError(f"none of {len(files)} files is a readable image, such as {files[0].where}")
    if corrupt:
        print(f"{corrupt} of {len(files)} files cannot be read: their rows are empty", file=sys.stderr)
    if args.output:
        print(args.output)
