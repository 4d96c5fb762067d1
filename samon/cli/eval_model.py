"""The models of validate.py: --model names, pretrained weights, checkpoints and test-time pooling."""

import logging
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timm import utils
from timm.layers import apply_test_time_pool
from torch import nn

from samon.errors import UserError
from samon.evals.context import DataConfig, EvalContext
from samon.evals.datasets import EvalSpec
from samon.trainer import fsdp
from samon.trainer import model as models
from samon.trainer.config import Config
from samon.trainer.distributed import DistInfo
from samon.trainer.state import SUFFIX, load_weights

log = logging.getLogger("samon")
_SUFFIXES = (SUFFIX, ".pth", ".safetensors")


@dataclass(frozen=True)
class Job:
    """A model to evaluate.

    Attributes:
        checkpoint: its file; empty: the model as created.
        use_ema: evaluate the checkpoint's averaged weights.
        class_names: classes that the checkpoint was trained on.
        class_map_digest: of the labels that it was trained on, if its run's --class-map is used.
        name: the model's name in file names.
        forced_float32: accuracy is not in the run's precision, because of other evaluations.
    """

    checkpoint: str
    config: Config
    use_ema: bool
    specs: list[EvalSpec]
    class_names: list[str] | None = None
    class_map_digest: str = ""
    name: str = ""
    forced_float32: bool = False


def list_model_names(model: str | None) -> list[str | None]:
    """The models that --model stands for: `all` with ImageNet weights, those of a pattern or of a file, or itself."""
    if model == "all":
        pretrained = timm.list_models(pretrained=True)
        return [name for name in pretrained if getattr(timm.get_pretrained_cfg(name), "num_classes", 0) == 1000]
    if model is None or timm.is_model(model):
        return [model]
    if any(sign in model for sign in "*?["):
        names = timm.list_models(model, pretrained=True)
    elif Path(model).is_file():
        names = Path(model).read_text().split()
    else:
        return [model]
    if not names:
        raise UserError(f"--model {model}: no model with pretrained weights; timm.list_models lists them")
    return [*names]


def list_checkpoints(paths: list[str]) -> list[str]:
    """Checkpoint files of --checkpoint, for a run directory its best; `[""]` without any, the model as created."""
    files: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            inside = {p.name: str(p) for p in sorted(Path(path).iterdir()) if p.name.endswith(_SUFFIXES)}
            if not inside:
                raise UserError(f"--checkpoint {path}: no {', '.join(_SUFFIXES)} file in this directory")
            best = next((name for name in (f"model_best{SUFFIX}", f"last{SUFFIX}") if name in inside), None)
            files += [inside[best]] if best else inside.values()
        elif not Path(path).is_file():
            raise UserError(f"--checkpoint {path}: no such file")
        else:
            files.append(path)
    return list(dict.fromkeys(files)) or [""]


def build(job: Job, dist_info: DistInfo) -> EvalContext:
    """Create the job's model with its weights on the device."""
    config = models.resolve_precision(job.config, dist_info)
    utils.random_seed(config.seed)  # so that all processes have the same random weights
    model = create_model(config, pretrained=config.pretrained and not job.checkpoint)
    if job.checkpoint:
        load_weights(model, job.checkpoint, job.use_ema)
        log.info("%s: the %s of %s", config.model, "averaged weights" if job.use_ema else "weights", job.checkpoint)
    data_config = models.resolve_data_config(config, model, use_test_size=not config.use_train_size)
    if config.reparam:
        model = utils.reparameterize_model(model)
    if config.test_pool:
        model = apply_test_pool(config, model, data_config)
    mesh = fsdp.make_mesh(config, dist_info) if config.fsdp else None
    model = models.place_model(config, model, dist_info.device if mesh is None else torch.device("cpu")).eval()
    size = data_config["input_size"]
    if fault := models.input_size_error(model, size):
        raise UserError(f"{config.model} does not take images of {list(size)} ({fault}); give another --img-size")
    if mesh is not None:
        fsdp.shard_model(config, model, dist_info, mesh)
    device, autocast = dist_info.device, models.make_autocast(config, dist_info.device)
    process, compiled = (device, dist_info.rank, dist_info.size), models.compile_model(config, model)
    classes = job.class_names, job.class_map_digest
    return EvalContext(config, model, data_config, *process, autocast, job.name, *classes, compiled)


def create_model(config: Config, pretrained: bool) -> nn.Module:
    """Create the model; raise UserError if it has no pretrained weights, or they leave its classifier random."""
    cure = "give --checkpoint FILE, or --no-pretrained for random weights"
    if pretrained and ":" not in config.model:  # not from a hub, such as hf-hub:
        known = timm.get_pretrained_cfg(config.model)
        if known is None or not known.has_weights:
            raise UserError(f"--model {config.model} has no pretrained weights; {cure}")
        if config.num_classes not in (None, 0, known.num_classes):
            fault = f"the pretrained weights of {config.model} have {known.num_classes}, its classifier would be random"
            raise UserError(f"--num-classes {config.num_classes}: {fault}; {cure}")
    try:
        return models.create_model(config, pretrained=pretrained)
    except UserError as error:
        if pretrained and isinstance(error.__cause__, OSError):
            raise UserError(f"{error}; {cure}") from error
        raise


@torch.no_grad()
def apply_test_pool(config: Config, model: nn.Module, data_config: DataConfig) -> nn.Module:
    """Apply timm's test-time pooling for images larger than the model's own; raise UserError if it would change the
    logits for images of the model's own size."""
    num_classes, channels = model.num_classes, data_config["input_size"][0]
    size = model.pretrained_cfg["input_size"][1:]  # type: ignore[index]
    image = torch.linspace(-2, 2, channels * size[0] * size[1]).sin().reshape(1, channels, *size)
    try:
        logits = model.eval()(image)
        pooled, larger = apply_test_time_pool(model, data_config)
        fits = not larger or torch.allclose(logits, pooled.eval()(image), rtol=1e-3, atol=1e-3)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        fits = False
    if not fits:
        raise UserError(f"--test-pool: {config.model} has no plain average pooling before its classifier; drop it")
    if larger:
        pooled.num_classes = num_classes
        data_config["crop_pct"] = 1.0
    return pooled
