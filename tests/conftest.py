"""Test files whose optional package is not installed are left out, so that the others run on a machine without them."""

from importlib.util import find_spec

_NEEDS = {
    "cli/test_export.py": "onnxruntime",
    "experiments/test_translation.py": "sentencepiece",
    "report/test_draw.py": "matplotlib",
}
collect_ignore = [file for file, package in _NEEDS.items() if find_spec(package) is None]
