"""Command line and YAML -> one configuration. Precedence: defaults < file < per_opt[opt] < command line."""

import argparse
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm.optim
import yaml
from timm.utils.distributed import world_info_from_env

import samon
from samon.engines.ascent import make_ascent
from samon.errors import UserError, refuse
from samon.geometry import GEOMETRIES
from samon.registry import BASES, variant_of
from samon.trainer.flag_rows import SAM, TRAIN
from samon.trainer.flags import Flag, by_key, nearest, parse_command_line, rename_old

_PACKAGE = Path(__file__).parents[1]
# A wheel holds the recipes inside the package; a checkout and an editable install have them beside it.
RECIPES = next((path for path in (_PACKAGE / "hparams", _PACKAGE.parent / "hparams") if path.is_dir()), _PACKAGE)
FLAGS: dict[str, Flag] = by_key(TRAIN)
_IGNORED_KEYS = {"local_rank", "prefetcher", "rank", "world_size", "distributed"}  # as in timm's args.yaml
STORED = "configuration"  # what messages call the settings that a run has stored
AUTO = "auto"  # --resume: from where --experiment stands, if there is anything
DESCRIPTION = "Train a timm model, plainly or with a sharpness-aware optimizer (--opt samon-layerl2)."


class Config(argparse.Namespace):
    """Every flag's value by key, frozen; attributes, because timm's helpers read them so."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the configuration is frozen: {name} cannot be set; make another one with but()")

    def but(self, **changes: Any) -> "Config":
        """The same settings with some others."""
        return Config(**vars(self) | changes)


def parse(argv: list[str] | None = None, stored: Callable[[str], dict[str, Any]] = lambda resume: {}) -> Config:
    """The resolved configuration of train.py's command line; every mistake in it is a UserError.

    `stored`: the settings of the run that --resume names, which count where no --config is given.
    """
    given = parse_command_line(TRAIN, argv, DESCRIPTION)
    if given.get("config"):
        file = read_yaml(given["config"])
    else:
        file = stored(given["resume"]) if given.get("resume", AUTO) not in ("", AUTO) else {}
        if given.get("opt", file.get("opt")) != file.get("opt"):  # these were settled for the other one
            file = {key: value for key, value in file.items() if key not in ("rho", "eta")}
    config = resolve(given, file)
    check(config, given)
    return config


def resolve(given: Mapping[str, Any], file: Mapping[str, Any]) -> Config:
    """Merge the four layers; `file` may hold `per_opt: {opt name: {key: value}}`."""
    file = dict(file)
    where = given.get("config", STORED)
    per_opt = _per_opt(file.pop("per_opt", None) or {}, where)
    values = {key: flag.default for key, flag in FLAGS.items()}
    values |= _typed(file, where)
    opt = given.get("opt", values["opt"])
    values |= per_opt.get(opt, {})
    values |= _loss_switches(given)
    values["data_dir"] = values["data_dir"] or values["data"]
    if variant := variant_of(values["opt"]):  # its own numbers are told, not left open
        own = {"rho": variant.rho, "eta": GEOMETRIES[variant.geometry].eta}
        values |= {key: number for key, number in own.items() if values[key] is None}
    return Config(**values | {"data": None})


def recipe(name: str) -> Path:
    """A file as it is named, or else one of the recipes that come along (`imagenet/resnet50`)."""
    packaged = RECIPES / f"{name.removesuffix('.yaml').removeprefix('hparams/')}.yaml"
    return packaged if not Path(name).exists() and packaged.is_file() else Path(name)


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML without repeated keys, of which YAML itself takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice[0]!r} stands there twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def load_yaml(path: str, flag: str) -> Any:
    """The content of a YAML file or of one that comes along, which `flag` names.

    Raises:
        UserError: it cannot be read, is no YAML, or repeats a key.
    """
    try:
        return yaml.load(recipe(path).read_text(), UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        recipes = [str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml")]
        close = "" if path.endswith(".yaml") else nearest(path, recipes)
        raise UserError(f"{flag} {path} cannot be read: {reason}{close}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{flag} {path} is not YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: str, changes: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a YAML file or a recipe. `base: FILE`, seen from the file, names another that it changes.

    Args:
        changes: the files that change this one.
    """
    content, own = load_yaml(path, "--config"), recipe(path).resolve()
    if own in changes:
        raise UserError(f"--config {changes[0]}: `base` leads from {changes[-1]} back to {own}")
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no settings; write lines such as 'lr: 0.1'")
    if (base := content.pop("base", None)) is None:
        return content
    below = read_yaml(str(recipe(path).parent / str(base)), (*changes, own))
    per_opt = {"per_opt": (below.get("per_opt") or {}) | (content.get("per_opt") or {})}
    return below | content | (per_opt if per_opt["per_opt"] else {})


def _per_opt(table: Any, where: str) -> dict[str, dict[str, Any]]:
    if not isinstance(table, dict) or not all(isinstance(rows, dict | None) for rows in table.values()):
        raise UserError(f"per_opt in {where} must map optimizer names to settings")
    for name in table:
        _check_opt(name, f"per_opt in {where}")
    return {name: _typed(rows or {}, f"per_opt[{name}] in {where}") for name, rows in table.items()}


def _typed(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    typed = {}
    for key, value in rename_old(settings, FLAGS, warn=where != STORED).items():
        if key in _IGNORED_KEYS:
            continue
        if key not in FLAGS or key == "config":
            raise UserError(f"unknown key {key!r} in {where}{nearest(key, FLAGS)}")
        flag = FLAGS[key]
        if flag.refused:  # one of another version of timm may have another default, which its switch makes harmless
            switch = FLAGS.get(flag.switch, flag)
            if settings.get(switch.key) not in (None, False, "", 0, switch.default) and value != flag.default:
                raise UserError(f"{key} in {where} is not honoured: {flag.refused}")
            continue
        if value is None and flag.default not in (None, "", [], {}):
            raise UserError(f"{key} in {where} has no value; give one, or remove the line")
        try:
            typed[key] = flag.default if value is None else flag.parse(value)
        except UserError as error:
            raise UserError(f"{error} (in {where})") from None
    return _loss_switches(typed)


def _loss_switches(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one layer, with `--loss NAME` written as the switches --bce-loss and --jsd-loss."""
    loss, switches = settings.get("loss"), ("bce_loss", "jsd_loss")
    if not loss:
        return dict(settings)
    if other := next((key for key in switches if settings.get(key) and key != f"{loss}_loss"), None):
        raise UserError(f"--loss {loss} contradicts --{other.replace('_', '-')}; drop one of them")
    return {**settings, "loss": None, **{key: key == f"{loss}_loss" for key in switches}}


def dump(config: Config) -> str:
    """train.py's configuration as YAML that --config reads back."""
    skip = {"config", "print_config", "data"}
    values = {key: value for key, value in vars(config).items() if key in FLAGS and key not in skip}
    return yaml.safe_dump(values, sort_keys=False)


def check(config: Config, given: Mapping[str, Any]) -> None:
    """Mistakes visible in the settings alone."""
    _check_opt(config.opt, "--opt")
    if config.base_opt:
        _check_opt(config.base_opt, "--base-opt")
    _check_sam(config, given)
    _check_batches(config)
    if config.amp and config.model_dtype not in (None, "float32"):
        raise UserError(f"--amp needs float32 weights, --model-dtype is {config.model_dtype}; drop one of them")
    _check_norm(config)
    if config.sync_bn and config.split_bn:
        raise UserError("--sync-bn and --split-bn exclude each other; drop one of them")
    _check_fsdp(config, given)
    if config.wandb_resume_id and not config.resume:
        raise UserError("--wandb-resume-id needs --resume")
    if config.data_resident and config.epoch_repeats:
        raise UserError("--data-resident passes over the set once per epoch; drop --epoch-repeats")
    _check_schedule(config)
    if config.resume == AUTO and not config.experiment:
        raise UserError("--resume auto continues what --experiment names; add it")
    if config.save_epochs and config.checkpoint_format == "dcp":
        raise UserError("--save-epochs keeps single files; drop it, or --checkpoint-format dcp")
    if not config.print_config:
        _check_global_batch(config)


def _check_opt(name: str, where: str) -> None:
    known = timm.optim.list_optimizers()
    plain = str(name).lower().removeprefix("lookahead_")
    if plain not in known:
        raise UserError(f"{where}: unknown optimizer {name!r}{nearest(plain, known)}")


def _check_sam(config: Config, given: Mapping[str, Any]) -> None:
    if not samon.is_sam_name(config.opt):
        extra = [flag.flag for flag in SAM if flag.key in given]
        if extra:
            raise UserError(f"{extra[0]} does nothing with --opt {config.opt}; use one such as samon-layerl2")
        return
    base = next((suffix[1:] for suffix in filter(None, BASES) if config.opt.endswith(suffix)), "")
    if base and config.base_opt not in (None, base, BASES[f"-{base}"]):
        other = f"--opt {config.opt.removesuffix(f'-{base}')} --base-opt {config.base_opt}"
        raise UserError(f"--opt {config.opt} says {base}, --base-opt {config.base_opt}; use {other}")
    if config.sam_end_epoch is not None and config.sam_end_epoch <= config.sam_start_epoch:
        raise UserError(
            f"--sam-end-epoch {config.sam_end_epoch} is not behind --sam-start-epoch {config.sam_start_epoch}: no "
            "epoch has the two-pass step; drop one of them, or take the base optimizer"
        )
    try:
        re.compile(config.perturb or "")
    except re.error as error:
        raise UserError(f"--perturb {config.perturb!r} is not a regular expression: {error}") from None
    if config.sparsity is not None and not config.opt.startswith(("sam-random", "ssam-")):
        raise UserError(f"--sparsity is for sam-random, ssam-f and ssam-d, not {config.opt}")
    if {"fisher_samples", "mask_epochs"} & given.keys() and not config.opt.startswith("ssam-"):
        raise UserError(f"--fisher-samples and --mask-epochs are for ssam-f and ssam-d, not {config.opt}")
    if isinstance(config.m_sharpness, int):
        if config.batch_size % config.m_sharpness:
            raise UserError(f"batch size {config.batch_size} is not divisible by --m-sharpness {config.m_sharpness}")
        if config.aug_splits or config.ascent_fraction < 1:
            raise UserError("--m-sharpness with a number excludes --aug-splits and --ascent-fraction")
    _check_ascent(config)
    if config.aug_splits and config.ascent_fraction < 1:
        raise UserError("--ascent-fraction excludes --aug-splits: part of a batch holds part of the splits")


def _check_norm(config: Config) -> None:
    if config.fix_norm and (config.train_only_norm or config.norm_dropout):
        raise UserError("--fix-norm leaves no normalization parameters for --train-only-norm or --norm-dropout")
    if config.weight_decay_on and config.layer_decay:
        raise UserError("--weight-decay-on excludes --layer-decay, which makes groups of its own; drop one of them")
    if config.norm_dropout and (isinstance(config.m_sharpness, int) or config.torchcompile):
        raise UserError("--norm-dropout excludes --torchcompile and a number in --m-sharpness; drop one of them")


def check_sharding(config: Config, given: Mapping[str, Any], without: Mapping[str, bool]) -> None:
    """What train.py and validate.py refuse beside --fsdp; `without`: more of it, each with whether it is asked for."""
    if not config.fsdp:
        if extra := [key for key in ("fsdp_reshard_after_forward", "fsdp_replicate") if key in given]:
            raise UserError(f"--{extra[0].replace('_', '-')} is for --fsdp; add it, or drop this one")
        return
    without = {
        "--torchcompile": bool(config.torchcompile),
        "--channels-last": config.channels_last,
        "--amp-dtype float16 (use bfloat16)": config.amp and config.amp_dtype == "float16",
        **without,
    }
    refuse({f"--fsdp does not combine with {name}; drop one of them": asked for name, asked in without.items()})


def _check_fsdp(config: Config, given: Mapping[str, Any]) -> None:
    without = {
        "--sync-bn": config.sync_bn,
        "--split-bn": config.split_bn,
        "--clip-mode agc": config.clip_grad is not None and config.clip_mode == "agc",
        "--model-ema-force-cpu": config.model_ema_force_cpu,
        f"--opt {config.opt}": config.opt.lower().startswith(("lookahead", "ssam-", "sam-random")),
    }
    check_sharding(config, given, without)
    variant = variant_of(config.opt)
    if config.fsdp and variant is not None and not variant.norms_only:
        if config.m_sharpness != "global":
            raise UserError(
                f"--fsdp --opt {config.opt} perturbs weights that the processes share out, by one perturbation for "
                "all: add --m-sharpness global; samon's lie whole on each process and need not"
            )
        if config.ascent != "batch" or config.gsam_alpha:
            raise UserError(f"--fsdp --opt {config.opt} takes --ascent batch alone, and no --gsam-alpha; samon any")


def _check_schedule(config: Config) -> None:
    if config.sched == "plateau" and config.sched_on_updates:
        raise UserError("--sched plateau steps once per epoch; drop --sched-on-updates")
    if config.sched == "plateau" and config.start_epoch is not None:
        raise UserError("--sched plateau follows the metric, not the epoch; drop --start-epoch")
    if config.lr_decay_fn and config.sched not in ("wsd", "rsqrt"):
        raise UserError(f"--lr-decay-fn is for --sched wsd and rsqrt, not {config.sched}; drop it")
    if config.lr_stable_timescale and config.sched != "rsqrt":
        raise UserError(f"--lr-stable-timescale is for --sched rsqrt, not {config.sched}; drop it")


def _check_ascent(config: Config) -> None:
    source = make_ascent(config.ascent, config.gsam_alpha)
    several = config.m_sharpness != "device"
    if source.single_pass:
        if several or config.ascent_fraction < 1 or config.ascent_size:
            raise UserError(
                f"--ascent {config.ascent} makes no ascent pass and perturbs all processes alike; drop --m-sharpness, "
                "--ascent-fraction and --ascent-size"
            )
    elif config.ascent_size and (several or config.aug_splits or config.bn_stats == "both"):
        raise UserError("--ascent-size excludes --m-sharpness, --aug-splits and --bn-stats both; drop one of them")


def _check_batches(config: Config) -> None:
    mixing = config.mixup > 0 or config.cutmix > 0 or config.cutmix_minmax is not None
    splits, sizes, probs = config.aug_splits, config.train_img_sizes, config.train_size_probs
    channels = (config.input_size or [None])[0]
    mistakes = {
        "--aug-splits 1 splits nothing; use 0, or 2 and more": splits == 1,
        "--jsd-loss compares augmentation splits; add --aug-splits 3": config.jsd_loss and splits < 2,
        "--split-bn needs --aug-splits or --resplit": config.split_bn and splits < 2 and not config.resplit,
        "--mixup and --cutmix exclude --aug-splits; drop one of them": mixing and splits,
        "mixup and cutmix pair samples; use an even --batch-size": mixing and config.batch_size % 2,
        "--train-size-probs needs one value for each of --train-img-sizes": (
            sizes and probs and len(probs) != len(sizes)
        ),
        "--train-img-sizes excludes --aug-splits and --data-resident": sizes and (splits or config.data_resident),
        "--train-size-probs and --train-batches-per-epoch need --train-img-sizes": (
            not sizes and (probs or config.train_batches_per_epoch)
        ),
        f"--in-chans {config.in_chans} contradicts --input-size with {channels} channels; drop one of them": (
            config.in_chans and channels and config.in_chans != channels
        ),
    }
    refuse(mistakes)


def _check_global_batch(config: Config) -> None:
    """world x batch x accumulation == --global-batch-size, from the environment alone."""
    if config.global_batch_size is None:
        return
    world = world_info_from_env()[2] if os.environ.keys() & {"WORLD_SIZE", "SLURM_NTASKS"} else 1
    product = world * config.batch_size * config.grad_accum_steps
    if product != config.global_batch_size:
        raise UserError(
            f"--global-batch-size is {config.global_batch_size}, but {world} processes x batch {config.batch_size} x "
            f"accumulation {config.grad_accum_steps} make {product}; change one of them"
        )
