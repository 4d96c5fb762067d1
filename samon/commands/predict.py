"""What a model says of images: the likeliest classes of each file, as CSV.

    samon-predict photos/ --checkpoint output/train/RUN -o predictions.csv
    samon-predict cat.jpg dog.jpg --model resnet50.a1_in1k --pretrained --topk 1

Columns: file, then label_k and probability_k for k = 1 (likeliest) to --topk. Labels are the class folders' names that
the run was trained on, ImageNet's descriptions for models of its classes, or else numbers. Images are prepared as
samon-validate prepares them; further flags of samon-validate may stand behind --.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from timm.data.readers.img_extensions import get_img_extensions

from samon.data.faults import SampleError
from samon.data.shards import Record
from samon.data.sources import Source
from samon.errors import UserError, run_script
from samon.evals.entry import EvalImages, Target, batches, evaluating, predict
from samon.evals.main import build, parse
from samon.files import csv_text, write_text
from samon.session.world import processes


class Files(Source):
    """Image files, without labels."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> list[Record | SampleError]:
        """Each file's bytes."""
        return [Record(str(self.paths[index]), self.paths[index].read_bytes(), 0) for index in indices]


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and the images anywhere below the directories named, in order.

    Raises:
        UserError: a path that is not there, or no image at all.
    """
    endings, found = set(get_img_extensions()), []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in endings)
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
def predictions(target: Target, paths: Sequence[Path], topk: int) -> list[list[str]]:
    """A row for each file: file, label, probability, label, probability, ..."""
    config, labels = target.config, class_labels(target)
    mode = config.input_img_mode or ("RGB" if target.data_config["input_size"][0] == 3 else "L")
    images, rows = EvalImages(Files(paths), mode), []
    with evaluating(target.model):
        for _, indices, x, _ in batches(target, images, list(range(len(paths))), config.batch_size, bar="predicting"):
            with target.autocast():
                logits = predict(target.model, x)
            best = logits.float().softmax(1).topk(min(topk, len(labels)), dim=1)
            found = zip(indices.tolist(), best.values.tolist(), best.indices.tolist(), strict=True)
            for index, shares, classes in found:
                pairs = zip(classes, shares, strict=True)
                rows.append([str(paths[index]), *(text for c, p in pairs for text in (labels[c], f"{p:.6f}"))])
    return rows


def arguments(argv: list[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="samon-predict", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGES", help="files, or directories to search for images")
    add("--checkpoint", default="", help="run directory or checkpoint")
    add("--model", default="", help="timm model, where the checkpoint does not say it")
    add("--pretrained", action="store_true", help="timm's weights instead of a checkpoint")
    add("--topk", type=int, default=5, help="classes to name for each image (default %(default)s)")
    add("-o", "--output", type=Path, help="CSV file to write (default: standard output)")
    args = parser.parse_args(argv[:cut])
    args.validate = argv[cut + 1 :]
    if not args.checkpoint and not (args.model and args.pretrained):
        raise UserError("no weights: give --checkpoint RUN, or --model NAME --pretrained")
    if args.topk < 1:
        raise UserError(f"--topk must be at least 1, got {args.topk}")
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"{args.output.parent} does not exist; make it, or name another file")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    paths = image_files(args.images)
    given = {"--checkpoint": args.checkpoint, "--model": args.model}
    words = [word for flag, value in given.items() if value for word in (flag, value)]
    words += ["--pretrained"] * args.pretrained
    (job,) = parse([*words, *args.validate, "--dataset", "", "--data-dir", "."])  # no data set is read
    with processes(job.config) as world:
        if world.size > 1:
            raise UserError("predictions are made by one process; start it without torchrun")
        rows = predictions(build(job, world), paths, args.topk)
    head = ["file", *(f"{what}_{k}" for k in range(1, len(rows[0]) // 2 + 1) for what in ("label", "probability"))]
    text = csv_text([head, *rows])
    if args.output:
        write_text(args.output, text)
        print(args.output)
    else:
        print(text, end="")


if __name__ == "__main__":
    run_script(main)
