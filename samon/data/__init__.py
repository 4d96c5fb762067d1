"""Data: shards and folders as streams that lose nothing, and the loader that feeds a device from them."""

from samon.data.corrupt import (
    DataError,
    FaultCount,
    ImageError,
    ImageTooLargeError,
    LabelError,
    SampleError,
    ShardError,
)
from samon.data.in_memory import ResidentLoader, create_resident_loader
from samon.data.loader import Loader, create_dataset, create_loader

__all__ = [
    "DataError",
    "FaultCount",
    "ImageError",
    "ImageTooLargeError",
    "LabelError",
    "Loader",
    "ResidentLoader",
    "SampleError",
    "ShardError",
    "create_dataset",
    "create_loader",
    "create_resident_loader",
]
