"""Imports point downward: a module imports, at its top, only modules of the layers below it, or of its own."""

import ast
from collections.abc import Iterator
from pathlib import Path

import samon

ROOT = Path(samon.__file__).parent
# From the bottom to the top. What a layer above can do (groups, replay, sharding) is imported in the function that
# was asked for it. Evaluations do not know the trainer, which runs one of them.
LAYERS = """
errors compat
rng files progress schedule geometry scope contexts
ascent wrapper
sam
registry checks
two_pass
engines
models
data
evals
trainer
plan report
cli
timm_script
""".strip().splitlines()
LAYER = {name: number for number, line in enumerate(LAYERS) for name in line.split()}


def imports(body: list[ast.stmt]) -> Iterator[str]:
    """The modules of samon that these statements import, but for types alone, by their path inside the package."""
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module == "samon":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("samon."):
            yield str(node.module).removeprefix("samon.")
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from imports(node.body + node.orelse)


def test_imports_point_downward() -> None:
    checked = 0
    for path in ROOT.rglob("*.py"):
        layer = path.relative_to(ROOT).with_suffix("").parts[0]
        for name in imports(ast.parse(path.read_text()).body) if layer != "__init__" else ():
            below, checked = name.split(".")[0], checked + 1
            assert below not in LAYER or LAYER[below] <= LAYER[layer], f"{path.relative_to(ROOT)} imports samon.{name}"
    assert checked > 300
