"""Command line and YAML -> one configuration. Precedence: defaults < file < per_opt[opt] < command line."""

import argparse
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from timm.optim import list_optimizers
from timm.utils.distributed import world_info_from_env

import samon
from samon.errors import UserError, nearest
from samon.geometry import GEOMETRIES
from samon.registry import BASES, variant_of
from samon.trainer.combinations import base_info, check_combinations, describe_idle
from samon.trainer.flag_rows import SAM, TRAIN
from samon.trainer.flags import Flag, Settings, by_key, parse_command_line, rename_old

_PACKAGE = Path(__file__).parents[1]
# A wheel has the recipes inside the package; a checkout and an editable install have them beside it.
RECIPES = next((path for path in (_PACKAGE / "hparams", _PACKAGE.parent / "hparams") if path.is_dir()), _PACKAGE)
FLAGS: dict[str, Flag] = by_key(TRAIN)
# Second names of settings: one given later, as on the command line, replaces an earlier value of the first name.
ALTERNATIVES = {"data": "data_dir", "drop_connect": "drop_path", "lr_base": "lr"}
_IGNORED_KEYS = {"local_rank", "prefetcher", "rank", "world_size", "distributed"}  # of timm's args.yaml
STORED = "configuration"  # the name of a run's stored settings in messages
_warn_once = cache(logging.getLogger("samon").warning)  # a sweep parses the same settings again
AUTO = "auto"  # --resume: from the state of --experiment, if there is one
DESCRIPTION = "Train a timm model, with a sharpness-aware optimizer (--opt samon-layerl2) or any other."


class Config(argparse.Namespace):
    """The value of every flag by key, frozen. Attributes, because timm's helpers read them."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"the configuration is frozen: {name} cannot be set; use but({name}=...)")

    def but(self, **changes: Any) -> "Config":
        """A copy with some values changed."""
        return Config(**vars(self) | changes)


def parse(argv: list[str] | None = None, load_stored: Callable[[str], Settings] = lambda resume: {}) -> Config:
    """The resolved configuration of train.py's command line.

    Args:
        load_stored: returns the settings of the run that --resume names, which apply unless --config is given.
    """
    given = parse_command_line(TRAIN, argv, DESCRIPTION)
    file, written = Settings(), set(given)
    if given.get("config"):
        file = read_yaml(given["config"])
        written |= file.keys()
    elif given.get("resume", AUTO) not in ("", AUTO):
        file = load_stored(given["resume"])
        if given.get("opt", file.get("opt")) != file.get("opt"):  # the stored values are the other optimizer's
            file = {key: value for key, value in file.items() if key not in ("rho", "eta")}
    config = resolve(given, file)
    check(config, given)
    for text in describe_idle(config, FLAGS, given, written) if world_info_from_env()[1] == 0 else ():
        _warn_once(text)
    return config


def resolve(given: Settings, file: Settings) -> Config:
    """Merge defaults, `file` (which may contain `per_opt: {opt name: {key: value}}`) and the command line."""
    where, per_opt = given.get("config", STORED), {}
    for name, rows in file.get("per_opt", {}).items():
        _check_opt(name, f"per_opt in {where}")
        per_opt[name] = _parse_settings(rows, f"per_opt[{name}] in {where}")
    values: Settings = {key: flag.default for key, flag in FLAGS.items()}
    values |= _parse_settings({key: value for key, value in file.items() if key != "per_opt"}, where)
    for later in (per_opt.get(given.get("opt", values["opt"]), {}), _expand_loss(given)):
        values |= {first: None for second, first in ALTERNATIVES.items() if later.get(second) is not None} | later
    values["data_dir"] = values["data_dir"] or values["data"]
    if variant := variant_of(values["opt"]):
        own = {"rho": variant.rho, "eta": GEOMETRIES[variant.geometry].eta}
        values |= {key: default for key, default in own.items() if values[key] is None}
    return Config(**values | {"data": None})


def dump(config: Config) -> str:
    """train.py's configuration as YAML that --config accepts."""
    skipped = {"config", "print_config", "data"}
    values = {key: value for key, value in vars(config).items() if key in FLAGS and key not in skipped}
    return yaml.safe_dump(values, sort_keys=False)


@contextmanager
def flags_in_errors() -> Iterator[None]:
    """Library messages name arguments; inside, those of UserError name flags: `perturb='x'` becomes `--perturb 'x'`."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"(?<!\S)(\w+)=", lambda m: f"{FLAGS[m[1]].flag} " if m[1] in FLAGS else m[0], str(error))
        error.args = (text,)  # its class stays
        raise


def mixes(config: Config) -> bool:
    """Whether images are mixed (mixup or cutmix)."""
    return config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None


def images_per_batch(config: Config) -> int:
    """The number of images of a full batch as the model sees it: --aug-splits of each sample, or, as timm's collate
    function mixes with --mixup-mode half, one of two samples."""
    if mixes(config) and config.mixup_mode == "half" and not config.no_prefetcher:
        return int(config.batch_size) // 2
    return int(config.batch_size) * (config.aug_splits or 1)


# --- files ------------------------------------------------------------------------------------------------------------


def find_recipe(name: str) -> Path:
    """The file of this name, or a packaged recipe (`imagenet/resnet50`)."""
    packaged = RECIPES / f"{name.removesuffix('.yaml').removeprefix('hparams/')}.yaml"
    return packaged if not Path(name).exists() and packaged.is_file() else Path(name)


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that rejects repeated keys, of which YAML itself takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(problem=f"duplicate key {twice[0]!r}", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: str, flag: str) -> Any:
    """The content of a YAML file or packaged recipe.

    Raises:
        UserError: naming `flag`: it cannot be read, is not YAML, or repeats a key.
    """
    try:
        return yaml.load(find_recipe(path).read_text(), UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        recipes = [str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml")]
        hint = "" if path.endswith(".yaml") else nearest(path, recipes)
        raise UserError(f"{flag} {path} cannot be read: {reason}{hint}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{flag} {path} is not YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: str, parents: tuple[Path, ...] = ()) -> Settings:
    """The settings in a YAML file or recipe. `base: FILE`, relative to the file, names one that it changes; `parents`
    are the files that lead here in this way."""
    content, own = load_yaml(path, "--config"), find_recipe(path).resolve()
    if own in parents:
        raise UserError(f"--config {parents[0]}: `base` leads from {parents[-1]} back to {own}")
    if not isinstance(content, dict):
        raise UserError(f"--config {path} contains no settings; write lines such as 'lr: 0.1'")
    per_opt = content.pop("per_opt", None) or {}
    if not isinstance(per_opt, dict) or not all(isinstance(rows, dict | None) for rows in per_opt.values()):
        raise UserError(f"per_opt in {path} must map optimizer names to settings")
    base = content.pop("base", None)
    inherited = {} if base is None else read_yaml(str(find_recipe(path).parent / str(base)), (*parents, own))
    merged: dict[str, Settings] = inherited.get("per_opt", {})
    for name, rows in per_opt.items():
        key = str(name).lower()  # as timm's names of optimizers
        merged[key] = merged.get(key, {}) | (rows or {})
    return inherited | content | {"per_opt": merged}


def _parse_settings(settings: Mapping[str, object], where: str) -> Settings:
    """The settings of one layer of a file, with values of the flags' types."""
    parsed: Settings = {}
    for key, value in rename_old(settings, FLAGS, warn=where != STORED).items():
        if key in _IGNORED_KEYS:
            continue
        if key not in FLAGS or key == "config":
            raise UserError(f"unknown key {key!r} in {where}{nearest(key, FLAGS)}")
        flag = FLAGS[key]
        if flag.refused:  # defaults of the dependent ones differ between versions of timm
            if value != flag.default and not flag.dependent:
                raise UserError(f"{key} in {where} is not supported: {flag.refused}")
            continue
        if value is None and flag.default not in (None, "", [], {}):
            raise UserError(f"{key} in {where} has no value; give one, or remove the line")
        try:
            parsed[key] = flag.default if value is None else flag.parse(value)
        except UserError as error:
            raise UserError(f"{error} (in {where})") from None
    return _expand_loss(parsed)


def _expand_loss(settings: Settings) -> Settings:
    """Replace `--loss NAME` by the switches --bce-loss and --jsd-loss."""
    loss, switches = settings.get("loss"), ("bce_loss", "jsd_loss")
    if not loss:
        return dict(settings)
    if other := next((key for key in switches if settings.get(key) and key != f"{loss}_loss"), None):
        raise UserError(f"--loss {loss} contradicts --{other.replace('_', '-')}; drop one of them")
    return {**settings, "loss": None, **{key: key == f"{loss}_loss" for key in switches}}


# --- checks: mistakes that the settings alone show -------------------------------------------------------------------


def check(config: Config, given: Collection[str]) -> None:
    """Raise UserError if settings contradict each other or have no effect."""
    _check_opt(config.opt, "--opt")
    if samon.is_sam_name(config.opt):
        _check_sam(config, given)
    elif extra := [flag.flag for flag in SAM if flag.key in given]:
        raise UserError(f"{extra[0]} has no effect with --opt {config.opt}; use one such as samon-layerl2")
    names = ["opt", "lr", "momentum", "weight_decay", "layer_decay", *(flag.key for flag in SAM)]
    if twice := [FLAGS[key] for key in names if key in config.opt_kwargs]:
        raise UserError(f"--opt-kwargs {twice[0].key}: this has a flag of its own; give {twice[0].flag}")
    info, betas = base_info(config), config.opt_betas or []
    if betas and info is not None and info.has_betas and len(betas) != info.num_betas:
        raise UserError(f"--opt-betas: {info.name} has {info.num_betas} betas, got {len(betas)}")
    check_combinations(config, FLAGS)
    _check_batches(config)
    if config.amp and config.model_dtype not in (None, "float32"):
        raise UserError(f"--amp needs float32 weights, --model-dtype is {config.model_dtype}; drop one of them")
    if config.fsdp and config.opt.startswith(("lookahead", "ssam-", "sam-random")):
        raise UserError(f"--fsdp does not support --opt {config.opt}; drop lookahead_, or use a name without a mask")


def _check_opt(name: str, where: str) -> None:
    known, plain = list_optimizers(), name.removeprefix("lookahead_")
    if plain not in known:
        raise UserError(f"{where}: unknown optimizer {name!r}{nearest(plain, known)}")


def _check_sam(config: Config, given: Collection[str]) -> None:
    opt, m = config.opt, config.m_sharpness
    base = next((suffix[1:] for suffix in filter(None, BASES) if opt.endswith(suffix)), "")
    if base and config.base_opt not in (None, base, BASES[f"-{base}"]):
        other = f"--opt {opt.removesuffix(f'-{base}')} --base-opt {config.base_opt}"
        raise UserError(f"--opt {opt} says {base}, --base-opt {config.base_opt}; use {other}")
    name, by_steps = opt.removeprefix("lookahead_"), "mask_every" in config.opt_kwargs
    for key, scope in {"mask_epochs": "ssam-", "fisher_samples": "ssam-f"}.items():
        if key in given and (by_steps or not name.startswith(scope)):
            also = " and mask_every in --opt-kwargs" if by_steps else ""
            raise UserError(f"{FLAGS[key].flag} has no effect with --opt {opt}{also}; drop it")
    if name.startswith("ssam-f") and config.jsd_loss and not by_steps:
        raise UserError(f"--opt {opt} takes its mask from single images, which have no --jsd-loss; drop one of them")
    if (tail_opt := config.tail_opt) is not None:
        _check_opt(tail_opt, "--tail-opt")
        if "lookahead_" in opt + tail_opt:
            raise UserError("--tail-opt replaces the base optimizer, where Lookahead keeps its state; drop lookahead_")
        if config.sam_tail == 1:
            raise UserError(f"--sam-tail 1 leaves no update before --tail-opt; use --base-opt {tail_opt} instead")
    if isinstance(m, int) and (config.aug_splits or config.norm_dropout):
        raise UserError(f"--m-sharpness {m} excludes --aug-splits and --norm-dropout; drop one of them")
    if isinstance(m, int) and (images := images_per_batch(config)) % m:
        raise UserError(f"a batch of {images} images is not divisible by --m-sharpness {m}")


def _check_batches(config: Config) -> None:
    if config.aug_splits == 1:
        raise UserError("--aug-splits 1 splits nothing; use 0, or at least 2")
    if config.aug_repeats % 1:
        raise UserError(f"--aug-repeats {config.aug_repeats}: give a whole number")
    if config.batch_size % 2 and mixes(config):
        raise UserError("mixup and cutmix pair samples; use an even --batch-size")
    if config.train_size_probs and len(config.train_size_probs) != len(config.train_img_sizes):
        raise UserError("--train-size-probs needs one value for each of --train-img-sizes")
    if config.global_batch_size is not None and not config.print_config:
        processes = world_info_from_env()[2] if os.environ.keys() & {"WORLD_SIZE", "SLURM_NTASKS"} else 1
        product = processes * config.batch_size * config.grad_accum_steps
        if product != config.global_batch_size:
            raise UserError(
                f"--global-batch-size is {config.global_batch_size}, but {processes} processes x batch "
                f"{config.batch_size} x accumulation {config.grad_accum_steps} make {product}; change one of them"
            )
