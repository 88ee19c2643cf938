"""What the documents on security rest on: tests and files that are there."""

import ast
import re
from pathlib import Path

import pytest

from tests.shape.repository import ROOT, name_of, parsed

DOCUMENTS = [ROOT / "SECURITY.md", *sorted((ROOT / "docs" / "security").glob("*.md"))]
CHECKLIST = ROOT / "docs" / "security" / "nist-800-207.md"
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w.][\w./-]*")
ENDINGS = (".py", ".md", ".toml", ".txt")
TREES = ("tests/", "src/", "docs/", "benchmarks/", ".ci/")
BASES = (ROOT, ROOT / "src" / "fallow", ROOT / "docs", ROOT / "docs" / "security")


def references() -> list[tuple[Path, str, str]]:
    """Each `file::test` of each document, once."""
    found = {
        (document, file, test)
        for document in DOCUMENTS
        for file, test in REFERENCE.findall(document.read_text("utf-8"))
    }
    return sorted(found)


def named_files(document: Path) -> list[str]:
    """What a document names as a file of this repository: in code, with an ending or a folder of ours."""
    pieces = {piece.split("::")[0].split(":")[0] for piece in CODE.findall(document.read_text(encoding="utf-8"))}
    return sorted(
        piece for piece in pieces if FILE.fullmatch(piece) and (piece.endswith(ENDINGS) or piece.startswith(TREES))
    )


@pytest.mark.parametrize(
    ("document", "file", "test"), references(), ids=lambda each: each if isinstance(each, str) else each.name
)
def test_a_test_that_is_referred_to_exists(document: Path, file: str, test: str) -> None:
    assert (ROOT / file).is_file(), f"{document.name}: {file}"
    names = {
        node.name for node in ast.walk(parsed(ROOT / file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert test in names, f"{document.name}: {file} has no {test}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_that_are_named_exist(document: Path) -> None:
    """As paths from the root, from the package, or from the document; a bare name, anywhere in the tests."""
    for name in named_files(document):
        somewhere = any((base / name).exists() for base in BASES)
        assert somewhere or ("/" not in name and any((ROOT / "tests").rglob(name))), f"{document.name}: {name}"


def test_every_row_of_the_checklist_names_its_test_or_says_what_is_missing() -> None:
    rows = [line for line in CHECKLIST.read_text(encoding="utf-8").splitlines() if re.match(r"\| \d", line)]
    assert len(rows) >= 7 + 6 + 10 + 7, "tenets, assumptions, requirements and threats of SP 800-207"
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 5, row
        asked, answer, missing, shown = cells[1:]
        assert asked
        assert answer
        assert missing, f"say what is missing, or that nothing known is: {row}"
        assert REFERENCE.search(shown) or shown == "none", row
