"""Finds and runs the benchmarks of a checkout: every module of `benchmarks/` that has a `main(argv) -> dict`."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def benchmarks() -> dict[str, str]:
    """Return the benchmarks by name, each with the first line of its docstring. Raises `FileNotFoundError` outside a checkout."""
    found = {}
    for file in sorted(_home().glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def bench(name: str | None = None, arguments: Sequence[str] = (), *, console: Console | None = None) -> dict[str, Any]:
    """Run the benchmark `name` with its own command-line arguments and return its record; without a name, list them all.

    Raises `ValueError` naming the known ones for a name that does not exist.
    """
    known = benchmarks()
    if name is None:
        table = Table("benchmark", "what it measures", box=None)
        for row in known.items():
            table.add_row(*row)
        (console or Console()).print(table)
        return {"benchmarks": known}
    if name not in known:
        raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(known)}")
    root = str(_home().parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    return import_module(f"benchmarks.{name}").main(list(arguments))


def _home() -> Path:
    home = Path(__file__).parents[2] / "benchmarks"
    if not home.is_dir():
        raise FileNotFoundError("benchmarks are part of a checkout of the source, not of the installed package")
    return home
