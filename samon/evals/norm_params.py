"""Distributions of the normalization parameters gamma and beta, by layer type and depth (Figures 5 and 9)."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samon.errors import UserError, require_matplotlib
from samon.evals.context import EvalContext
from samon.evals.results import Result, file_stem
from samon.files import name_write_errors
from samon.progress import wrap_path
from samon.scope import norm_modules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NormValues = dict[tuple[str, str], list[tuple[str, Tensor]]]  # (layer type, "gamma" | "beta") -> [(layer, values)]


def check(context: EvalContext, dataset: None) -> None:
    """Check that the model has normalization parameters."""
    norm_values(context.model)


def evaluate(context: EvalContext, dataset: None = None) -> list[Result]:
    """Statistics of gamma and beta by layer type, over all layers (`layer` is `all`) and of each layer."""
    results: list[Result] = []
    for (layer_type, role), layers in norm_values(context.model).items():
        pooled = torch.cat([values for _, values in layers])
        for depth, (layer, values) in enumerate([("all", pooled), *layers]):
            metadata = {"layer_type": layer_type, "layer": layer, "depth": depth, "num_samples": values.numel()}
            for metric, value in ((f"{role}_{name}", value) for name, value in summarize(values).items()):
                results.append({"metric": metric, "value": value, **metadata, "setting": f"{layer_type} {metric}"})
    return results


def norm_values(model: nn.Module) -> NormValues:
    """Every affine normalization parameter, flat on the CPU, by layer type and role, in order of depth."""
    groups: NormValues = {}
    for name, module in norm_modules(model).items():
        for role, attribute in (("gamma", "weight"), ("beta", "bias")):
            parameter = getattr(module, attribute, None)
            if isinstance(parameter, nn.Parameter):
                values = parameter.detach().float().cpu().flatten()
                groups.setdefault((type(module).__name__, role), []).append((name, values))
    if not groups:
        raise UserError("norm_params: the model has no affine normalization layer; evaluate another model")
    return groups


def summarize(values: Tensor) -> dict[str, float]:
    """Statistics of values, and of their magnitudes (Figure 9 shows these)."""
    exact = values.double()
    low, median, high = torch.quantile(exact, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    mean, std = float(exact.mean()), float(exact.std(correction=0))
    magnitudes = {"abs_mean": float(exact.abs().mean()), "abs_max": float(values.abs().max())}
    return {"mean": mean, "std": std, "q05": low, "median": median, "q95": high, **magnitudes}


# --- figures --------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> "Figure":
    """A matplotlib figure of this size in inches that needs no display; raise UserError if matplotlib is missing."""
    return require_matplotlib().Figure(figsize=(width, height), layout="constrained")


def draw_signed(models: dict[str, NormValues]) -> "Figure":
    """Figure 5: gamma (top) and beta (bottom), signed on linear axes, a column per model with shared axes."""
    figure = new_figure(3.6 * len(models), 5)
    panels = figure.subplots(2, len(models), squeeze=False, sharex="row", sharey="row")
    for row, role in enumerate(("gamma", "beta")):
        flat = {  # the values of all layers by model
            name: torch.cat([torch.empty(0), *(w for (_, r), layers in values.items() if r == role for _, w in layers)])
            for name, values in models.items()
        }
        pooled = torch.cat([*flat.values()])
        low, high = (float(pooled.min()), float(pooled.max())) if len(pooled) else (0.0, 0.0)
        edges = torch.linspace(low - 1e-6, high + 1e-6, 61, dtype=torch.float64)
        for axis, (name, values) in zip(panels[row], flat.items(), strict=True):
            counts = torch.histogram(values.double(), edges).hist
            axis.stairs(counts.numpy(), edges.numpy(), fill=True)
            axis.set(xlabel=f"$\\{role}$")
            axis.set_title(wrap_path(name, 34), fontsize="small")
        panels[row][0].set_ylabel("parameters")
    return figure


def draw_magnitudes(models: dict[str, NormValues]) -> "Figure":
    """|w| of all models per layer type and role (log counts, as Figure 9), and its mean by depth."""
    panels = sorted({key for values in models.values() for key in values})
    figure = new_figure(4.5 * len(panels), 7)
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, (layer_type, role) in enumerate(panels):
        top, bottom = axes[0][column], axes[1][column]
        layers = {name: values.get((layer_type, role), []) for name, values in models.items()}
        largest = max((float(w.abs().max()) for entries in layers.values() for _, w in entries), default=0.0)
        for i, (name, entries) in enumerate(layers.items()):
            if entries:
                style = {"color": f"C{i}", "label": wrap_path(name, 50)}
                magnitudes = torch.cat([w.abs() for _, w in entries]).numpy()
                top.hist(magnitudes, bins=60, range=(0, largest or 1.0), histtype="step", log=True, **style)
                bottom.plot([float(w.abs().mean()) for _, w in entries], marker=".", **style)
        top.set(title=f"{layer_type} {role}", xlabel=f"|{role}|", ylabel="parameters")
        bottom.set(xlabel="depth (layers from the input)", ylabel=f"mean |{role}|")
    lines = {line.get_label(): line for axis in axes[1] for line in axis.get_lines()}
    figure.legend(handles=lines.values(), loc="outside lower center", fontsize="small")
    return figure


def plot(models: dict[str, NormValues], path: Path) -> None:
    """Write `draw_signed` to `path` and as PDF, and `draw_magnitudes` to NAME-magnitudes."""
    signed, magnitudes = draw_signed(models), path.with_name(f"{path.stem}-magnitudes{path.suffix}")
    figures = {path: signed, path.with_suffix(".pdf"): signed, magnitudes: draw_magnitudes(models)}
    for file, figure in figures.items():
        with name_write_errors(file):
            figure.savefig(file, dpi=150 if figure is signed else 120)


def write_tensorboard(models: dict[str, NormValues], directory: Path) -> None:
    """Write a histogram per layer, with the depth as step, to a directory per model."""
    from torch.utils.tensorboard import SummaryWriter

    for name, values in models.items():
        with SummaryWriter(str(directory / file_stem(name))) as writer:
            for (layer_type, role), layers in values.items():
                for depth, (_, w) in enumerate(layers):
                    writer.add_histogram(f"norm_params/{layer_type}_{role}", w, depth)
