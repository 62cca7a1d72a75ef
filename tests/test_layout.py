"""How the source is laid out: few rooms, short files and functions, and no line that the formatter may not touch."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lavender"
FILES = sorted(SOURCE.rglob("*.py"))


def _names(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def test_the_top_has_few_packages_and_modules():
    packages = [path.parent.name for path in SOURCE.glob("*/__init__.py")]
    modules = [path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__"]
    assert len(packages) <= 8, packages
    assert len(modules) <= 8, modules


def test_the_import_contract_has_few_layers_and_names_every_room():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [layers] = [contract for contract in settings["contracts"] if contract["type"] == "layers"]
    assert len(layers["layers"]) <= 10
    assert layers["exhaustive"]


def test_files_and_functions_are_short():
    long = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 400:
            long.append(_names(path))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if node.end_lineno - node.lineno + 1 > 60:
                    long.append(f"{_names(path)}: {node.name}")
    assert not long


def test_the_formatter_decides_alone():
    assert not [_names(path) for path in FILES if "fmt: " in path.read_text(encoding="utf-8")]


def test_every_module_says_what_it_holds():
    silent = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if tree.body and not ast.get_docstring(tree):
            silent.append(_names(path))
    assert not silent


def test_what_is_left_out_of_test_cpu_compares_no_computed_numbers():
    """`make test-cpu` repeats tests on other kernels: those that such a comparison could fail must stay in."""
    [listed] = re.findall(r"^CPU_LEFT_OUT := (.*?[^\\])$", (ROOT / "Makefile").read_text(), re.M | re.S)
    files = [ROOT / name for name in listed.replace("\\", " ").split()]
    assert len(files) > 20
    compares = re.compile(r"\b(close|moved|approx|allclose|assert_close|torch\.equal|isclose)\(")
    assert not [str(path.relative_to(ROOT)) for path in files if compares.search(path.read_text(encoding="utf-8"))]
