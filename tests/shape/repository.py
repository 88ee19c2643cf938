"""The repository as the shape tests see it: its files, without what tools leave behind."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fallow"
GENERATED = {".git", ".venv", "build", "dist", "results"}


def text_files() -> Iterator[Path]:
    """Every text file that belongs to the repository."""
    for path in _tracked():
        try:
            path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield path


def modules() -> list[Path]:
    """Every Python module of the package."""
    return sorted(SOURCE.rglob("*.py"))


def parsed(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def imported_names(module: Path) -> set[str]:
    """Top-level packages that are imported, wherever in the module."""
    names: set[str] = set()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def name_of(path: Path) -> str:
    """A test id that does not depend on where the clone is."""
    return str(path.relative_to(ROOT))


def _tracked() -> list[Path]:
    """What git knows or would take; every file, where git is not there."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        everything = (path for path in ROOT.rglob("*") if path.is_file())
        hidden = ("__pycache__", "_cache", ".hypothesis", ".egg-info")
        return [
            path
            for path in everything
            if not GENERATED & set(path.relative_to(ROOT).parts) and not any(mark in str(path) for mark in hidden)
        ]
