"""Sharpness-aware minimization for timm. Importing registers the optimizers and networks with timm."""

from samon import models
from samon.errors import UserError
from samon.registry import is_sam_name, register
from samon.sam import SAM, sam_of
from samon.scope import register_norm
from samon.two_pass import two_pass

__version__ = "0.1.0"
register()

__all__ = ["SAM", "UserError", "__version__", "is_sam_name", "models", "register_norm", "sam_of", "two_pass"]
