"""The paper's CIFAR networks; importing this package registers them with timm."""

from samon.models.cifar import CifarNet

__all__ = ["CifarNet"]
