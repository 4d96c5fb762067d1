"""Distributions of the normalization parameters gamma and beta, by layer type and depth (Figures 5 and 9)."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from samon.errors import UserError, require_matplotlib
from samon.evals.entry import Entry, Target
from samon.evals.results import Row
from samon.files import name_write_errors
from samon.progress import wrap_path
from samon.scope import norm_modules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEEDS_DATA = False
Values = dict[tuple[str, str], list[tuple[str, Tensor]]]  # (layer type, gamma|beta) -> [(layer, values)] by depth


def values(model: nn.Module) -> Values:
    """Every affine normalization parameter on the CPU, grouped by layer type and role, in order of depth."""
    found: Values = {}
    for name, module in norm_modules(model).items():
        for role, attribute in (("gamma", "weight"), ("beta", "bias")):
            parameter = getattr(module, attribute, None)
            if isinstance(parameter, nn.Parameter):
                kind = type(module).__name__
                found.setdefault((kind, role), []).append((name, parameter.detach().float().cpu().flatten()))
    if not found:
        raise UserError("norm_params: the model has no affine normalization layer; evaluate another model")
    return found


def statistics(w: Tensor) -> dict[str, float]:
    """Numbers that describe a distribution: of w and of |w| (Figure 9 shows |w|)."""
    exact = w.double()
    low, median, high = torch.quantile(exact, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    found = {"mean": exact.mean(), "std": exact.std(correction=0), "q05": low, "median": median, "q95": high}
    found |= {"abs_mean": exact.abs().mean(), "abs_max": w.abs().max()}
    return {key: float(value) for key, value in found.items()}


def described(found: Values) -> list[Row]:
    """One row per number: over all layers of a type (``layer`` is ``all``), then layer by layer with its depth."""
    out: list[Row] = []
    for (kind, role), layers in found.items():
        everything = torch.cat([w for _, w in layers])
        for depth, (name, w) in enumerate([("all", everything), *layers]):
            about = {"layer_type": kind, "layer": name, "depth": depth, "num_samples": w.numel()}
            for key, value in statistics(w).items():
                metric = f"{role}_{key}"
                out.append({"metric": metric, "value": value, **about, "setting": f"{kind} {metric}"})
    return out


def prepare(target: Target, _entry: Entry) -> Values:
    """The parameters; a model without any is refused before any work."""
    return values(target.model)


def rows(target: Target, _entry: Entry | None = None) -> list[Row]:
    """Statistics of gamma and beta by layer type, over all layers and for each."""
    return described(values(target.model))


def new_figure(width: float, height: float) -> "Figure":
    """A figure of this size in inches, drawn without a display. matplotlib is imported only where figures are drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    return require_matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def bins(found: Values, role: str, edges: Tensor) -> Tensor:
    """How many values of gamma or beta, over all layers, lie between each two of ``edges``."""
    layers = [w for (_, r), entries in found.items() if r == role for _, w in entries]
    return torch.histogram(torch.cat([torch.empty(0), *layers]).double(), edges.double()).hist


def draw(models: dict[str, Values]) -> "Figure":
    """Figure 5: a column for each model, gamma above and beta below, signed values on linear axes.

    The panels of a row share both axes, so that the models can be compared.
    """
    figure = new_figure(3.6 * len(models), 5)
    panels = figure.subplots(2, len(models), squeeze=False, sharex="row", sharey="row")
    for row, role in enumerate(("gamma", "beta")):
        every = [w for found in models.values() for (_, r), layers in found.items() if r == role for _, w in layers]
        low, high = (float(getattr(torch.cat(every or [torch.zeros(1)]), side)()) for side in ("min", "max"))
        edges = torch.linspace(low - 1e-6, high + 1e-6, 61, dtype=torch.float64)
        for axis, (name, found) in zip(panels[row], models.items(), strict=True):
            axis.stairs(bins(found, role, edges).numpy(), edges.numpy(), fill=True)
            axis.set(xlabel=f"$\\{role}$")
            axis.set_title(wrap_path(name, 34), fontsize="small")
        panels[row][0].set_ylabel("parameters")
    return figure


def plot(models: dict[str, Values], path: Path) -> None:
    """Figure 5 under the name asked for and as PDF beside it, and `draw_magnitudes` as NAME-magnitudes."""
    figure = draw(models)
    for wanted in {path, path.with_suffix(".pdf")}:
        with name_write_errors(wanted):
            figure.savefig(wanted, dpi=150)
    magnitudes = path.with_name(f"{path.stem}-magnitudes{path.suffix}")
    with name_write_errors(magnitudes):
        draw_magnitudes(models).savefig(magnitudes, dpi=120)


def draw_magnitudes(models: dict[str, Values]) -> "Figure":
    """For every layer type and role, |w| of all models in a panel (log counts, as Figure 9), and its mean by depth."""
    panels = sorted({key for found in models.values() for key in found})
    figure = new_figure(4.5 * len(panels), 7)
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, (kind, role) in enumerate(panels):
        top, bottom = axes[0][column], axes[1][column]
        layers = {name: found.get((kind, role), []) for name, found in models.items()}
        longest = max((float(w.abs().max()) for entries in layers.values() for _, w in entries), default=0.0)
        for i, (name, entries) in enumerate(layers.items()):
            if entries:
                look = {"color": f"C{i}", "label": wrap_path(name, 50)}
                magnitudes = torch.cat([w.abs() for _, w in entries]).numpy()
                top.hist(magnitudes, bins=60, range=(0, longest or 1.0), histtype="step", log=True, **look)
                bottom.plot([float(w.abs().mean()) for _, w in entries], marker=".", **look)
        top.set(title=f"{kind} {role}", xlabel=f"|{role}|", ylabel="parameters")
        bottom.set(xlabel="depth (layers from the input)", ylabel=f"mean |{role}|")
    lines = {line.get_label(): line for axis in axes[1] for line in axis.get_lines()}
    figure.legend(handles=lines.values(), loc="outside lower center", fontsize="small")
    return figure


def directory_name(model: str) -> str:
    """What a model's directory of --norm-tensorboard is called."""
    return model.replace("/", "_")


def write_tensorboard(models: dict[str, Values], directory: Path) -> None:
    """Histograms of every layer (step = depth, so the histogram view shows depth) under ``directory/<model>``."""
    from torch.utils.tensorboard import SummaryWriter

    for name, found in models.items():
        with SummaryWriter(str(directory / directory_name(name))) as writer:
            for (kind, role), layers in found.items():
                for depth, (_, w) in enumerate(layers):
                    writer.add_histogram(f"norm_params/{kind}_{role}", w, depth)
