"""Sharpness-aware minimization for timm. Importing registers the optimizers and networks with timm."""
