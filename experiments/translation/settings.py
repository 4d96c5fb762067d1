"""Settings of a run: a YAML recipe, overridden by the command line."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from samon import UserError


@dataclass(frozen=True)
class Settings:
    """Defaults are the base settings of the Transformer for IWSLT'14; `iwslt14.yaml` says where each comes from.

    Attributes:
        text: directory of plain text pairs, `train.de`/`train.en`, `valid.*`, `test.*`; or None.
        catalogues: directory of further packages with German message catalogues, besides the installed Django.
        valid, test: apps (folders around `locale/`) held out from training.
        held_out: n of a split by hash, instead of `valid` and `test`: a catalogue file is test text if the SHA-256 of
            its path is 0 modulo n, and validation text if it is 1.
        vocabulary: tokens of the joint BPE.
        share_all: encoder and decoder share one embedding; the decoder's is always tied to the output.
        max_tokens: sentences times longest sentence of a micro-batch, padding included.
        max_length: longest training pair in tokens; longer ones are skipped.
        accumulate: micro-batches per update.
        m_sharpness: `micro`: a perturbation for each micro-batch; `global`: one for the whole update.
        warmup: updates of linear warm-up before the inverse-square-root decay.
        rho: radius of the perturbation; None is the optimizer's own default.
        save_every: updates between two checkpoints inside an epoch.
    """

    text: str | None = None
    catalogues: str | None = None
    valid: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)
    held_out: int = 0
    vocabulary: int = 10000
    d_model: int = 512
    heads: int = 4
    layers: int = 6
    ffn: int = 1024
    dropout: float = 0.3
    share_all: bool = False
    opt: str = "samon-adamw"
    rho: float | None = None
    lr: float = 5e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = 1e-4
    warmup: int = 4000
    smoothing: float = 0.1
    max_tokens: int = 4096
    max_length: int = 175
    accumulate: int = 1
    m_sharpness: str = "micro"
    epochs: int = 50
    bfloat16: bool = False
    seed: int = 0
    save_every: int = 500
    valid_every: int = 1


def load_settings(recipe: str | None, overrides: dict[str, Any]) -> Settings:
    """The settings of the recipe, overridden by those of the command line that are not None.

    Raises:
        UserError: no such file, no YAML mapping, an unknown name, or a value of the wrong type or range.
    """
    values: Any = {}
    if recipe is not None:
        try:
            values = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"no recipe at {recipe}; experiments/translation/ holds iwslt14.yaml and django.yaml"
            ) from None
        except yaml.YAMLError as error:
            raise UserError(f"{recipe} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{recipe} must hold `name: value` lines")
    return checked({**values, **{k: v for k, v in overrides.items() if v is not None}})


def checked(values: dict[str, Any]) -> Settings:
    """Settings from plain values; UserError names the first invalid one."""
    known = {f.name: f for f in dataclasses.fields(Settings)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown setting {name!r}; known are {', '.join(known)}")
        if not _fits(known[name].type, value):
            raise UserError(
                f"{name} must be {_kind(known[name].type)}, got {value!r} (YAML reads 1e-4 as text: 1.0e-4)"
            )
    s = Settings(**values)
    for name in ("vocabulary", "d_model", "heads", "layers", "ffn", "max_tokens", "max_length", "accumulate"):
        _require(getattr(s, name) > 0, name, "must be at least 1")
    for name in ("warmup", "epochs", "save_every", "valid_every"):
        _require(getattr(s, name) > 0, name, "must be at least 1")
    for name in ("dropout", "smoothing"):
        _require(0 <= getattr(s, name) < 1, name, "must be in [0, 1)")
    _require(len(s.betas) == 2 and all(0 <= b < 1 for b in s.betas), "betas", "must be two numbers in [0, 1)")
    _require(s.held_out == 0 or s.held_out > 2, "held_out", "must be at least 3, or 0 for valid: and test:")
    _require(not s.held_out or not (s.valid or s.test), "held_out", "excludes valid: and test:")
    _require(s.lr > 0, "lr", "must be positive")
    _require(s.d_model % (2 * s.heads) == 0, "d_model", f"must be a multiple of 2 * heads = {2 * s.heads}")
    _require(s.m_sharpness in ("micro", "global"), "m_sharpness", "must be 'micro' or 'global'")
    return s


def _require(condition: bool, name: str, text: str) -> None:
    if not condition:
        raise UserError(f"{name} {text}; change it in the recipe or on the command line")


def _kind(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)


def _fits(annotation: Any, value: Any) -> bool:
    text = _kind(annotation)
    if value is None:
        return "None" in text
    if isinstance(value, bool):
        return text.startswith("bool")
    if isinstance(value, list):
        return text.startswith("list") and all(isinstance(v, str if "str" in text else (int, float)) for v in value)
    if isinstance(value, str):
        return text.startswith("str")
    if isinstance(value, int) and text.startswith("int"):
        return True
    return isinstance(value, (int, float)) and text.startswith("float")
