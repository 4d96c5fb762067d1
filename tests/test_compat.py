"""What older versions and other systems lack."""

import subprocess
import sys

import pytest
import torch

from samon import compat
from tests.runs import ROOT


def test_copies_are_equal_and_independent(monkeypatch):
    tensors = [torch.randn(3), torch.randn(2, 5).T, torch.tensor(2.0, dtype=torch.bfloat16)]
    for hidden in (False, True):
        if hidden:
            monkeypatch.delattr(torch, "_foreach_clone", raising=False)  # as before torch 2.13
        copies = compat.foreach_clone(tensors)
        for tensor, copy in zip(tensors, copies, strict=True):
            assert torch.equal(tensor, copy)
            assert (copy.dtype, copy.stride()) == (tensor.dtype, tensor.stride())
            assert copy.data_ptr() != tensor.data_ptr()


def test_every_module_can_be_imported_without_what_windows_lacks():
    pytest.importorskip("matplotlib")
    code = """
import os, pkgutil, select, signal, sys
from importlib import import_module
import timm, torch.utils.tensorboard, torchvision, matplotlib.figure, tqdm  # they ask the system, which is not Windows
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for module, names in (
    (select, "poll epoll"),
    (signal, "SIGUSR1 SIGUSR2 SIGCHLD SIGPIPE SIGHUP SIGALRM pthread_sigmask sigwaitinfo"),
    (os, "fork wait4 killpg setsid getuid sched_getaffinity mkfifo"),
):
    for name in names.split():
        delattr(module, name)
import samon.trainer.main
assert "samon.evals.accuracy" in sys.modules  # training does not load the tables of shift sets
assert not {"samon.evals.shifts", "samon.evals.datasets", "samon.evals.attacks"} & {*sys.modules}
for module in pkgutil.walk_packages(samon.__path__, "samon."):
    import_module(module.name)
    print(module.name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"samon.cli.sweep", "samon.trainer.main", "samon.plan.step"} <= set(done.stdout.split())
