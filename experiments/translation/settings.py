"""Settings of a run: a YAML recipe, overridden by the command line."""

import dataclasses
from dataclasses import dataclass

from samon import UserError
from samon.errors import nearest
from samon.trainer.config import load_yaml


@dataclass(frozen=True)
class Settings:
    """Defaults are the base settings of the Transformer for IWSLT'14; `iwslt14.yaml` says where each comes from.

    Attributes:
        text: directory of plain text pairs, `train.de`/`train.en`, `valid.*`, `test.*`; empty: message catalogues.
        catalogues: directory of further packages with German message catalogues, besides the installed Django.
        held_out: a catalogue file is test text if the SHA-256 of its path is 0 modulo this, validation text if 1.
        vocabulary: tokens of the joint BPE.
        share_all: encoder and decoder share one embedding; the decoder's is always tied to the output.
        max_tokens: sentences times longest sentence of a micro-batch, padding included.
        max_length: longest training pair in tokens; longer ones are skipped.
        accumulate: micro-batches per update.
        m_sharpness: `micro`: a perturbation for each micro-batch; `global`: one for the whole update.
        warmup: updates of linear warm-up before the inverse-square-root decay.
        rho: radius of the perturbation; 0 is the optimizer's own default.
    """

    text: str = ""
    catalogues: str = ""
    held_out: int = 12
    vocabulary: int = 10000
    d_model: int = 512
    heads: int = 4
    layers: int = 6
    ffn: int = 1024
    dropout: float = 0.3
    share_all: bool = False
    opt: str = "samon-adamw"
    rho: float = 0.0
    lr: float = 5e-4
    beta2: float = 0.98
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
    valid_every: int = 1


def load_settings(recipe: str | None, overrides: dict[str, object]) -> Settings:
    """The settings of the recipe, overridden by those of the command line that are not None.

    Raises:
        UserError: no such file, no YAML mapping, an unknown name, or a value of the wrong type.
    """
    values = load_yaml(recipe, "--config") if recipe else {}
    if not isinstance(values, dict):
        raise UserError(f"--config {recipe} must hold `name: value` lines")
    known = {field.name: field.default for field in dataclasses.fields(Settings)}
    values |= {name: value for name, value in overrides.items() if value is not None}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown setting {name!r}{nearest(name, known)}; known are {', '.join(known)}")
        kinds = (int, float) if isinstance(known[name], float) else type(known[name])
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(known[name], bool):
            raise UserError(f"{name}: {value!r} is not like {known[name]!r} (YAML reads 1e-4 as text: write 1.0e-4)")
    if values.get("m_sharpness", "micro") not in ("micro", "global"):
        raise UserError(f"m_sharpness must be 'micro' or 'global', got {values['m_sharpness']!r}")
    return Settings(**values)
