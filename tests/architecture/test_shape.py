"""Files hold one idea and functions are short: the numbers at which a reviewer would ask."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from nearcast.config import ENVIRONMENT_RESERVED

ROOT = Path(__file__).parents[2]
PACKAGES = ("nearcast", "router", "edge_node", "cloud_core", "model_sync", "simulations", "benchmarks")
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
"""Without the docstring: explaining more must never count against a function."""
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "base"}


def sources() -> list[Path]:
    found = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return sorted(path for path in found if "_pb2" not in path.name)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def test_the_sources_are_found() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in sources()} == set(PACKAGES)


def test_files_are_short() -> None:
    counted = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {name: lines for name, lines in counted.items() if lines > FILE_LINES_MAX} == {}


def test_functions_are_short() -> None:
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": length(node)
        for path in sources()
        for node in functions(ast.parse(path.read_text()))
        if length(node) > FUNCTION_LINES_MAX
    }
    assert long == {}


def test_length_leaves_out_the_docstring() -> None:
    (node,) = functions(ast.parse('def f():\n    """One.\n\n    Two.\n    """\n    return 1\n'))
    assert length(node) == 2


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [path for path in sources() if path.stem in VAGUE or path.parent.name in VAGUE] == []


def test_settings_come_from_the_configuration_alone() -> None:
    readers = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value}"
        for path in sources()
        if path != ROOT / "nearcast/config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"NEARCAST_\w+", node.value)
        if node.value not in ENVIRONMENT_RESERVED
    ]
    assert readers == []


@pytest.mark.parametrize("package", PACKAGES[:-1])
def test_every_module_says_what_it_is(package: str) -> None:
    silent = [
        path.relative_to(ROOT)
        for path in sources()
        if path.is_relative_to(ROOT / package)
        and path.stat().st_size
        and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []
