"""How the code is laid out: imports, docstrings, length."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.shape.repository import ROOT, imported_names, modules, name_of, parsed

LINES_MAX = 400


def test_imports_keep_their_contracts() -> None:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command; lint_imports_command()",
        "--no-cache",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("module", modules(), ids=name_of)
def test_module_is_of_a_readable_length(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= LINES_MAX


@pytest.mark.parametrize("module", modules(), ids=name_of)
def test_module_and_its_public_names_are_documented(module: Path) -> None:
    tree = parsed(module)
    assert ast.get_docstring(tree), "the module has no docstring"
    assert not list(undocumented(tree.body)), "public names without a docstring"


def undocumented(body: list[ast.stmt]) -> Iterator[str]:
    """Public classes and functions of a module that say nothing about themselves.

    Methods may follow a documented contract, and a function of one statement may speak for itself.
    """
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        speaks_for_itself = not isinstance(node, ast.ClassDef) and len(node.body) == 1
        if not ast.get_docstring(node) and not speaks_for_itself:
            yield node.name


PURE = [module for module in modules() if {"policy", "domain"} & set(module.relative_to(ROOT).parts)]


@pytest.mark.parametrize("module", PURE, ids=name_of)
def test_policy_and_domain_do_no_input_or_output(module: Path) -> None:
    assert not called_names(module) & {"open", "print", "input"}


@pytest.mark.parametrize("module", modules(), ids=name_of)
def test_nothing_is_unpickled_or_evaluated(module: Path) -> None:
    assert not called_names(module) & {"exec", "eval"}
    assert not imported_names(module) & {"pickle", "marshal", "shelve", "dill"}


def called_names(module: Path) -> set[str]:
    """Plain names that are called, wherever in the module."""
    calls = (node.func for node in ast.walk(parsed(module)) if isinstance(node, ast.Call))
    return {called.id for called in calls if isinstance(called, ast.Name)}
