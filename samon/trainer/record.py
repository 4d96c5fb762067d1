"""How a run was made and what it cost: `run.json` beside its figures, which `samon-report` reads."""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

import samon
from samon.files import write_text
from samon.trainer.config import Config
from samon.trainer.distributed import DistInfo
from samon.trainer.flags import program

RECORD = "run.json"


def machine() -> dict[str, Any]:
    """Operating system, processor, cores and GPUs."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = models[0].partition(":")[2].strip() if models else processor
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "processor": processor, "cores": os.cpu_count(), "gpus": gpus}


def cpu_seconds() -> float:
    """Processor time of this process and its ended children."""
    return round(sum(os.times()[:4]), 2)


def write_record(directory: Path, config: Config, world: DistInfo, metrics: Mapping[str, Any], seconds: float) -> None:
    """The final metrics with command, versions, machine, seconds and rank 0's processor seconds (of this start alone
    where the run was resumed, which `resumed` says)."""
    content = {
        "metrics": dict(metrics),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds(),
        "resumed": bool(config.resume),
        "command": f"{program()} {shlex.join(sys.argv[1:])}".rstrip(),
        "recipe": config.config,
        "processes": world.size,
        "versions": {"samon": samon.__version__, "torch": str(torch.__version__), "timm": timm.__version__},
        "machine": machine(),
    }
    write_text(directory / RECORD, json.dumps(content, indent=1) + "\n")
