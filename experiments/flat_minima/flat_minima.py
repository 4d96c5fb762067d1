#!/usr/bin/env python3
"""What a flat minimum is good for: the finished runs of an experiment, with rounded weights and on corrupted images.

    python experiments/flat_minima/flat_minima.py output/experiments/few_images --data-dir DIR [--table]
    python experiments/flat_minima/flat_minima.py experiments/flat_minima/results.json --figures DIR

Reads the last checkpoint of each run below OUTPUT/test/ (compare.py writes them) and measures, on the test images:
accuracy with the weights rounded to 8, 6 and 4 bits; accuracy on images corrupted at severities 3 and 5, by those
corruptions of CIFAR-10-C (Hendrycks & Dietterich 2019) that are a formula of the pixels; the worst-case sharpness of
Table 6 and the feature rank on training images. Writes OUTPUT/flat_minima.json after every run and skips those that are
in it; prints the mean and standard deviation over seeds.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from samon.cli.eval_model import create_model
from samon.cli.program import run_script
from samon.cli.sweep import FINGERPRINT
from samon.cli.validate import parse
from samon.data.source_factory import read_npz
from samon.data.sources import parse_split
from samon.errors import UserError, require_matplotlib
from samon.evals.feature_rank import energy_rank, feature_matrix, squared_singular_values
from samon.evals.sharpness import Measure, sharpness
from samon.files import markdown_table, write_text
from samon.report.content import Json, mean_text
from samon.report.figures import Figure, means
from samon.trainer.state import load_weights

BITS = (8, 6, 4)
MEASURE = "worst-linf-adaptive-logitnorm@0.005"
SHARPNESS_IMAGES, M, RANK_IMAGES = 1024, 128, 1000
SEVERITIES = {3: 2, 5: 4}  # and their place in the lists of strengths


def gaussian_noise(x: Tensor, level: int) -> Tensor:
    return x + torch.randn(x.shape, generator=_generator()) * (0.04, 0.06, 0.08, 0.09, 0.10)[level]


def shot_noise(x: Tensor, level: int) -> Tensor:
    photons = (500, 250, 100, 75, 50)[level]
    return torch.poisson(x * photons, generator=_generator()) / photons


def impulse_noise(x: Tensor, level: int) -> Tensor:
    """This share of the values become 0 or 1, each as likely."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    u = torch.rand(x.shape, generator=_generator())
    return torch.where(u < share / 2, 0.0, torch.where(u > 1 - share / 2, 1.0, x))


def blur(x: Tensor, level: int) -> Tensor:
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[level]
    return gaussian_blur(x, [9, 9], [sigma, sigma])


def brightness(x: Tensor, level: int) -> Tensor:
    """V of HSV plus a constant: all channels grow by the factor that takes their maximum there."""
    v = x.amax(1, keepdim=True)
    return torch.where(v > 0, x / v.clamp(min=1e-12), 1.0) * (v + (0.05, 0.1, 0.15, 0.2, 0.3)[level]).clamp(max=1)


def contrast(x: Tensor, level: int) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[level]


CORRUPTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    f.__name__: f for f in (gaussian_noise, shot_noise, impulse_noise, blur, brightness, contrast)
}


def _generator() -> torch.Generator:
    """The same noise for every model."""
    return torch.Generator().manual_seed(0)


def corrupt(images: Tensor, name: str, severity: int) -> Tensor:
    """uint8 images [N, C, H, W], corrupted and truncated to uint8 again, as CIFAR-10-C's."""
    changed = CORRUPTIONS[name](images / 255, SEVERITIES[severity])
    return (changed.clamp(0, 1) * 255).to(torch.uint8)


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> None:
    """Round matrices and convolutions in place to `bits` bits, symmetric around 0, with a scale per output channel."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            largest = parameter.abs().flatten(1).amax(1).clamp(min=1e-12)
            scale = (largest / (2 ** (bits - 1) - 1)).view(-1, *[1] * (parameter.dim() - 1))
            parameter.copy_((parameter / scale).round() * scale)


class Evaluation:
    """The measurements of a run.

    Args:
        run: directory with args.yaml and last.pth.tar.
        data_dir: directory of the data set.
        images: number of test images, from the first on.
    """

    def __init__(self, run: Path, data_dir: Path, device: str, images: int) -> None:
        settings: Json = yaml.safe_load((run / "args.yaml").read_text())
        self.device = device
        (self.job,) = parse(["--checkpoint", str(run / "last.pth.tar"), "--evals", "norm_params"])
        if not settings["dataset"].startswith("npz/"):
            raise UserError(f"{run} was trained on {settings['dataset']}; only npz/NAME can be corrupted here")
        path = data_dir / (settings["dataset"].removeprefix("npz/") + ".npz")
        (train, labels), (test, test_labels) = (read_npz(path, part) for part in ("train", "validation"))
        test, test_labels = test[:images], test_labels[:images]
        _, part = parse_split(settings.get("train_split", "train"))
        train, labels = train[part], labels[part]
        self.train, self.test = (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous() for x in (train, test))
        self.labels, self.test_labels = (torch.as_tensor(y, dtype=torch.int64) for y in (labels, test_labels))
        self.statistics = torch.tensor([settings["mean"], settings["std"]]).view(2, 1, -1, 1, 1)

    def model(self) -> nn.Module:
        """The model as validate.py would evaluate it."""
        model = create_model(self.job.config, pretrained=False)
        load_weights(model, self.job.checkpoint, self.job.use_ema)
        return model.to(self.device).eval()

    def batches(self, images: Tensor, labels: Tensor, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalized batches on the device."""
        for x, y in zip(images.split(size), labels.split(size), strict=True):
            yield ((x / 255 - self.statistics[0]) / self.statistics[1]).to(self.device), y.to(self.device)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, images: Tensor) -> dict[str, float]:
        """Accuracy in % and loss on the test labels."""
        correct = loss = 0.0
        for x, y in self.batches(images, self.test_labels):
            logits = model(x)
            correct += float((logits.argmax(1) == y).sum())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
        return {"top1": 100 * correct / len(images), "loss": loss / len(images)}

    def measure(self) -> dict[str, float]:
        """All figures by name; accuracies in %."""
        model = self.model()
        values = self.accuracy(model, self.test)
        for bits in BITS:
            rounded = self.model()
            round_weights(rounded, bits)
            values[f"{bits} bits"] = self.accuracy(rounded, self.test)["top1"]
        for severity in SEVERITIES:
            each = {c: self.accuracy(model, corrupt(self.test, c, severity))["top1"] for c in CORRUPTIONS}
            values |= {f"{name} {severity}": top1 for name, top1 in each.items()}
            values[f"corrupted, severity {severity}"] = statistics.fmean(each.values())
        count = min(SHARPNESS_IMAGES, len(self.train)) // M
        part = slice(count * M)
        numbered = ((i, x, y) for i, (x, y) in enumerate(self.batches(self.train[part], self.labels[part], M)))
        per_batch = sharpness(model, numbered, count, Measure.parse(MEASURE))
        values["worst sharpness"] = float(next(iter(per_batch.values())).mean())
        rows = torch.arange(min(RANK_IMAGES, len(self.train)))
        normalized = (x for x, _ in self.batches(self.train[rows], self.labels[rows], RANK_IMAGES))
        features = feature_matrix(model, ((rows, x) for x in normalized), len(rows))
        values["feature rank"] = energy_rank(squared_singular_values(features, "column"))
        return values


COLUMNS = ("top1", *(f"{bits} bits" for bits in BITS), *(f"corrupted, severity {s}" for s in SEVERITIES))
COLUMNS += ("worst sharpness", "feature rank")
FORMATS = {"worst sharpness": ".4f", "feature rank": ".0f"}


def origin(run: Path, images: int) -> Json:
    """What a row was measured on: the fingerprint of the run's settings, and the number of test images."""
    path = run / FINGERPRINT
    return {"fingerprint": path.read_text().strip() if path.exists() else None, "images": images}


def is_current(row: Json, directory: Path, images: int) -> bool:
    """Whether a row is of the run now in its directory, on as many images; earlier versions recorded neither."""
    return all(row.get(key, value) == value for key, value in origin(directory / row["run"], images).items())


def by_method(rows: list[Json]) -> dict[str, list[dict[str, float]]]:
    """The figures of each method's runs."""
    methods = defaultdict(list)
    for row in rows:
        methods[row["method"]].append(row["values"])
    return methods


def figures(rows: list[Json]) -> list[Figure]:
    """Accuracy lost by rounding and accuracy on corrupted images, mean and standard deviation over the runs."""
    lost, corrupted = [], []
    for method, runs in by_method(rows).items():
        lost.append(means(method, [(bits, [run["top1"] - run[f"{bits} bits"] for run in runs]) for bits in BITS]))
        levels = {0: "top1"} | {severity: f"corrupted, severity {severity}" for severity in SEVERITIES}
        corrupted.append(means(method, [(x, [run[name] for run in runs]) for x, name in levels.items()]))
    rounding = Figure("rounding", "Accuracy lost by rounding", "", lost, "bits of a weight", "accuracy lost, points")
    axis, measure = "severity of the corruption (0: none)", "accuracy, %"
    corruption = Figure("corruption", "Accuracy on corrupted images", "", corrupted, axis, measure)
    return [replace(figure, integer=True) for figure in (rounding, corruption)]


def table(rows: list[Json]) -> str:
    """Mean and standard deviation over the runs of each method, as Markdown."""
    lines = [["method", "runs", *COLUMNS]]
    for method, runs in by_method(rows).items():
        cells = [mean_text([run[column] for run in runs], FORMATS.get(column, ".2f")) for column in COLUMNS]
        lines.append([method, str(len(runs)), *cells])
    return markdown_table(lines)


def measure_runs(args: argparse.Namespace) -> list[Json]:
    """The rows of the runs below `args.output`, measured where they are missing unless `args.table`."""
    runs = sorted(path.parent for path in args.output.glob("test/*/*/last.pth.tar"))
    if not runs:
        raise UserError(f"{args.output}: no test/METHOD/RUN/last.pth.tar; name the --output of compare.py")
    path = args.output / "flat_minima.json"
    rows: list[Json] = json.loads(path.read_text()) if path.exists() else []
    rows = [row for row in rows if is_current(row, args.output, args.images)]
    known = {row["run"] for row in rows}
    for run in runs:
        name = str(run.relative_to(args.output))
        if not args.table and name not in known and (run / "result.json").exists():
            values = Evaluation(run, args.data_dir, args.device, args.images).measure()
            rows.append({"method": run.parent.name, "run": name, "values": values, **origin(run, args.images)})
            write_text(path, json.dumps(rows) + "\n")
            print(f"{name}: {values['top1']:.2f}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="--output of compare.py, or a file with results")
    parser.add_argument("--data-dir", type=Path, help="of the data set; not needed with --table or a file")
    parser.add_argument("--images", type=int, default=10_000, help="number of test images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="measure nothing; print what is finished")
    parser.add_argument("--figures", type=Path, help="directory for each figure as .pdf and .svg")
    args = parser.parse_args(argv)
    if not (args.output.is_file() or args.table or args.data_dir):
        raise UserError("--data-dir is missing; give the directory of the data set, or --table to measure nothing")
    rows = json.loads(args.output.read_text()) if args.output.is_file() else measure_runs(args)
    if args.figures:
        require_matplotlib()
        from samon.report.draw import write_figure

        args.figures.mkdir(parents=True, exist_ok=True)
        for figure in figures(rows):
            write_figure(figure, {method: (i, i) for i, method in enumerate(by_method(rows))}, args.figures)
    print(table(rows))


if __name__ == "__main__":
    run_script(main)
