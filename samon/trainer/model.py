"""Models for every program: timm's factory, pretrained weights that are checked, frozen parameters, precision."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import torch
from PIL import ImageMode
from timm.data import resolve_input_data_config
from timm.data.transforms import str_to_interp_mode
from timm.layers import set_fast_norm
from timm.models import resolve_model_input_args
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from samon.errors import UserError, error_line, nearest, reraise_as_user_error
from samon.progress import plural
from samon.sam import CUDA_GRAPH_MODES
from samon.trainer import ablations
from samon.trainer.config import Config
from samon.trainer.distributed import DistInfo
from samon.trainer.flags import Settings
from samon.trainer.state import load_file

log = logging.getLogger("samon")


def check_model_name(config: Config) -> None:
    """Raise UserError if timm does not know the model."""
    if not config.model.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(config.model):
        known = nearest(config.model.split(".")[0], timm.list_models())
        raise UserError(f"--model: unknown model {config.model!r}{known}")


def create_model(config: Config, **arguments: Any) -> nn.Module:
    """Create the model on the CPU by timm's factory, with further arguments of timm's."""
    check_model_name(config)
    set_fast_norm(config.fast_norm)
    arguments |= {"num_classes": config.num_classes, "global_pool": config.gp}
    with reraise_as_user_error(f"--model {config.model}"):
        arguments = resolve_model_input_args(config.model, vars(config), **arguments | config.model_kwargs)
        model = timm.create_model(**arguments)
    if not hasattr(model, "in_chans"):  # timm's data configuration reads it
        model.in_chans = arguments.get("in_chans", 3)
    return model


@torch.no_grad()
def create_train_model(config: Config) -> nn.Module:
    """Create the model to train: pretrained weights, regularization, the head's initial values, frozen parameters."""
    for key in ("initial_checkpoint", "pretrained_path"):
        path, flag = getattr(config, key), f"--{key.replace('_', '-')}"
        if path and not Path(path).exists():
            raise UserError(f"{flag}: no file {path}")
        if path and not path.endswith((".safetensors", ".npz", ".npy")):
            load_file(Path(path), flag)  # names what is wrong; timm would guess
    overlay = {"file": config.pretrained_path, "num_classes": -1} if config.pretrained_path else None
    with check_pretrained(config.pretrained_path) if config.pretrained_path else nullcontext():
        model: Any = create_model(
            config,
            pretrained=config.pretrained or overlay is not None,
            pretrained_cfg_overlay=overlay,
            checkpoint_path=config.initial_checkpoint,
            drop_rate=config.drop,
            drop_block_rate=config.drop_block,
            drop_path_rate=config.drop_connect if config.drop_path is None else config.drop_path,
            bn_momentum=config.bn_momentum,
            bn_eps=config.bn_eps,
        )
    with reraise_as_user_error(f"--model {config.model}"):
        if config.head_init_scale is not None:
            for parameter in model.get_classifier().parameters():
                parameter.mul_(config.head_init_scale)
        if config.head_init_bias is not None:
            bias = getattr(model.get_classifier(), "bias", None)
            if bias is None:
                raise UserError(f"--head-init-bias: the classifier of {config.model} has no bias; drop the flag")
            bias.fill_(config.head_init_bias)
        if config.grad_checkpointing:
            model.set_grad_checkpointing(enable=True)
    if config.fix_norm:
        ablations.fix_norm(model)
    if config.train_only_norm:
        ablations.train_only_norm(model)
    if config.norm_dropout:
        ablations.add_norm_dropout(model, config.norm_dropout)
    if config.freeze:  # last, because --train-only-norm would unfreeze
        freeze(model, config.freeze)
    return model


@contextmanager
def check_pretrained(path: str) -> Iterator[None]:
    """Check that a file has the weights of the model that timm creates inside.

    timm drops the classifier and then loads whatever fits, so that a file of another network, or with other names,
    leaves the model at its random start without a word.
    """
    load: Any = nn.Module.load_state_dict
    loads: list[tuple[nn.Module, set[str]]] = []  # the last one is that of the model itself

    def watch(module: nn.Module, *args: Any, **kwargs: Any) -> object:
        result = load(module, *args, **kwargs)
        loads.append((module, set(result.missing_keys)))
        return result

    with patch.object(nn.Module, "load_state_dict", watch):
        yield
    if not loads:
        return
    model, missing = loads[-1]
    head = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    names = {name for name, _ in model.named_parameters() if not (heads and name.startswith(heads))}
    missing &= names
    if names and len(missing) > len(names) / 2:
        raise UserError(
            f"--pretrained-path {path} lacks {len(missing)} of the model's {len(names)} parameters, such as "
            f"{min(missing)}; name a file of this model, under timm's names"
        )
    if missing:
        log.warning("--pretrained-path %s lacks %s, left at random", path, ", ".join(sorted(missing)))


def freeze(model: nn.Module, pattern: str) -> None:
    """Freeze the parameters whose qualified name the regex matches; BatchNorm statistics still move."""
    names = [name for name, _ in model.named_parameters()]
    try:
        frozen = [p for name, p in model.named_parameters() if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"--freeze {pattern!r} is not a regular expression: {error}") from None
    if not frozen:
        raise UserError(f"--freeze {pattern!r} matches no parameter; names go from {names[0]} to {names[-1]}")
    for parameter in frozen:
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"--freeze {pattern!r} leaves nothing to train")
    share = sum(p.numel() for p in frozen) / sum(p.numel() for p in model.parameters())
    log.info("--freeze: %d tensors, %.1f %% of the parameters, are not trained", len(frozen), 100 * share)


# --- input ------------------------------------------------------------------------------------------------------------


def resolve_data_config(config: Config, model: nn.Module, use_test_size: bool = False) -> Settings:
    """timm's preprocessing: input_size, mean, std, interpolation, crop_pct, crop_mode."""
    with reraise_as_user_error(f"--model {config.model}"):
        data = resolve_input_data_config(model, vars(config), use_test_size=use_test_size)
    with reraise_as_user_error("--interpolation must be nearest, bilinear, bicubic, box, hamming or lanczos, not"):
        str_to_interp_mode(data["interpolation"])
    channels = data["input_size"][0]
    mode = config.input_img_mode or ("RGB" if channels == 3 else "L")
    with reraise_as_user_error("--input-img-mode must be a mode of Pillow such as L or RGB, not"):
        bands = len(ImageMode.getmode(mode).bands)
    if bands != channels:
        raise UserError(
            f"--in-chans {channels}: images are read as {mode}, {plural(bands, 'channel')}; use --in-chans 1 or "
            "3, or another --input-img-mode"
        )
    return data


@torch.no_grad()
def input_size_error(model: nn.Module, size: Sequence[int]) -> str:
    """Why the model does not accept an image of this size [C, H, W], in one line; '' if it does."""
    like, training = next(model.parameters()), model.training
    try:
        model.eval()(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
    except (AssertionError, RuntimeError, ValueError) as error:
        return error_line(error, 200)
    finally:
        model.train(training)
    return ""


def find_single_value_norm(model: nn.Module, size: Sequence[int]) -> str:
    """Name of a BatchNorm layer that sees one value per channel of an image of this size [C, H, W]; '' if none does."""
    names = {module: name for name, module in model.named_modules()}
    single: list[str] = []

    def check(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and inputs[0].numel() == inputs[0].shape[1]:
            single.append(names[module])

    with register_module_forward_pre_hook(check):
        input_size_error(model, size)
    return single[0] if single else ""


# --- device and precision ---------------------------------------------------------------------------------------------


def place_model(config: Config, model: nn.Module, device: torch.device) -> nn.Module:
    """Apply device, dtype of the weights, and memory format."""
    model.to(device=device, dtype=parse_dtype(config.model_dtype))
    return model.to(memory_format=torch.channels_last) if config.channels_last else model


def parse_dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def compile_model(config: Config, model: nn.Module) -> nn.Module:
    """The model as it is called: compiled if `--torchcompile` asks for it."""
    if not config.torchcompile:
        return model
    device = next(model.parameters()).device.type
    if config.torchcompile_mode == "reduce-overhead" and device != "cuda":
        raise UserError(f"--torchcompile-mode reduce-overhead needs CUDA graphs, not --device {device}; drop the mode")
    with reraise_as_user_error("--torchcompile"):
        return torch.compile(model, backend=config.torchcompile, mode=config.torchcompile_mode)  # type: ignore[return-value]


def uses_cuda_graphs(config: Config) -> bool:
    """Whether the compiled model runs as CUDA graphs on a GPU."""
    return bool(config.torchcompile) and config.torchcompile_mode in CUDA_GRAPH_MODES


def resolve_precision(config: Config, dist_info: DistInfo) -> Config:
    """Decide --amp-dtype auto for this device: bfloat16 if it has instructions for it, otherwise no mixed precision."""
    if not config.amp or config.amp_dtype != "auto":
        return config
    native = has_native_bfloat16(dist_info.device)
    if dist_info.is_rank_zero:
        log.info("--amp-dtype auto: %s on this %s", "bfloat16" if native else "float32", dist_info.device.type)
    return config.but(amp=native, amp_dtype="bfloat16")


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16; emulation would be slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def make_autocast(config: Config, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """A factory of the forward pass's context: autocast under --amp, otherwise one that does nothing."""
    if not config.amp:
        return nullcontext
    return partial(torch.autocast, device_type=device.type, dtype=parse_dtype(config.amp_dtype))
