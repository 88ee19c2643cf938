"""What a stranger meets first: documents that are true, pins that are complete, nothing that belongs to one machine."""

import itertools
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.shape.repository import ROOT, imported_names, modules, name_of, text_files

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)(\s*;.*)?")
LOCAL_PATHS = re.compile(r"(?<![\w.])/(?:home|Users|root|work|mnt|data|srv|opt)/[\w.-]+")
URL = re.compile(r"(?:https?|nats)://(?:[^\s/@'\"`]*@)?(\[[^\]]*\]|[^\s/:'\"`)>,;\]]+)")
PUBLIC_HOSTS = re.compile(
    r"(?:127\.0\.0\.1|0\.0\.0\.0|localhost|\[::1\]|\[|\{.*|192\.168\.1\.\d+|keepachangelog\.com|semver\.org|"
    r"www\.apache\.org|github\.com|arxiv\.org|huggingface\.co|[\w.]*example(?:\.com|\.org)?|testserver|gateway|api|"
    r"[a-z](?:\\n)?|\[fe80::1\]|%00|\\u2028|\[\^.*)"  # names that are none, and a pattern of names
)


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    matches = [PIN.fullmatch(line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    assert all(matches), "every line of constraints.txt is an exact pin"
    return {normalised(match[1]): match[2] for match in matches if match}


# --- pins ----------------------------------------------------------------------------------------


def test_every_dependency_is_pinned() -> None:
    wanted = [
        *PROJECT["dependencies"],
        *(each for extra in PROJECT["optional-dependencies"].values() for each in extra),
    ]
    names = {normalised(re.split(r"[\[<>=;! ]", requirement)[0]) for requirement in wanted}
    assert names <= pins().keys()


def test_what_the_dependencies_need_is_pinned_too() -> None:
    """Follows the metadata of what is installed here, from our dependencies down."""
    extras = ["", *PROJECT["optional-dependencies"]]
    code = (
        f"EXTRAS = {extras!r}"
        + """
import re, sys
from importlib.metadata import PackageNotFoundError, requires
from packaging.requirements import Requirement
seen, queue = set(), [Requirement(r) for r in requires("fallow") or []]
while queue:
    requirement = queue.pop()
    if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in EXTRAS):
        continue
    name = re.sub(r"[-_.]+", "-", requirement.name).lower()
    if name in seen:
        continue
    try:
        needed = requires(name) or []
    except PackageNotFoundError:
        continue
    seen.add(name)
    for each in map(Requirement, needed):
        if not each.marker or any(each.marker.evaluate({"extra": e}) for e in ["", *requirement.extras]):
            each.marker = None
            queue.append(each)
print("\\n".join(seen))
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - pins().keys() == set()


def test_a_pin_is_what_its_dependency_asks_for() -> None:
    pinned = pins()
    for each in map(Requirement, PROJECT["dependencies"]):
        assert each.specifier.contains(pinned[normalised(each.name)], prereleases=True), str(each)


def test_what_the_code_imports_is_declared() -> None:
    """A library that only a dependency brings along is not ours to import."""
    imported = {name for module in modules() for name in imported_names(module)}
    theirs = imported - set(sys.stdlib_module_names) - {"fallow"}
    extras = {
        normalised(re.split(r"[\[<>=;! ]", each)[0])
        for each in itertools.chain(*PROJECT["optional-dependencies"].values())
    }
    declared = {normalised(Requirement(each).name) for each in PROJECT["dependencies"]} | extras
    homes = packages_distributions()
    strays = {name for name in theirs if not {normalised(home) for home in homes.get(name, [])} & declared}
    assert not strays


def test_constraints_hold_no_address() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if not line.startswith("#") and ("/" in line or "@" in line or "--" in line)]


# --- nothing local ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", list(text_files()), ids=name_of)
def test_nothing_names_one_machine(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not LOCAL_PATHS.findall(text)
    if file.suffix in {".md", ".toml", ".txt", ".py", ""}:
        hosts = {host for host in URL.findall(text) if not PUBLIC_HOSTS.fullmatch(host)}
        assert not hosts


# --- documents -------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_no_figure_is_still_to_be_filled_in(document: Path) -> None:
    assert not re.findall(r"@[A-Z]+@|\b(?:TODO|FIXME|TBD|XXX)\b", document.read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_targets_exist(document: Path) -> None:
    code = re.findall(r"`[^`]*`|^\s*make .*$", document.read_text(encoding="utf-8"), re.MULTILINE)
    targets = {target for piece in code for target in re.findall(r"\bmake ([a-z]+)\b", piece)}
    assert targets <= set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_and_options_exist(document: Path) -> None:
    """Every `fallow …` that a document shows is a command, with options that it has."""
    from typer.main import get_command

    from fallow.cli.app import app

    text = document.read_text(encoding="utf-8")
    shown = re.findall(r"`fallow ((?:[^`]|\n)+?)`", text) + re.findall(r"^ *fallow ([a-z].*)$", text, re.MULTILINE)
    for line in shown:
        words = line.split("#")[0].split()
        command = get_command(app)
        while hasattr(command, "commands") and words and not words[0].startswith(("--", "…")):
            assert words[0] in command.commands, f"fallow {line}: no such command"
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in known | {"--help", "--version"}, f"fallow {line}: {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_options_on_their_own_exist_somewhere(document: Path) -> None:
    from typer.main import get_command

    from fallow.cli.app import app

    known = {"--exclude-editable", "--help"}
    queue = [get_command(app)]
    while queue:
        command = queue.pop()
        queue += getattr(command, "commands", {}).values()
        known |= {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    shown = re.findall(r"`(--[a-z-]+)", document.read_text(encoding="utf-8"))
    assert set(shown) <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_settings_in_documents_exist(document: Path) -> None:
    from fallow.config import setting_names

    names = setting_names()
    sections = {name.split(".")[0] for name in names if "." in name}
    shown = re.findall(r"`([a-z]+)\.([a-z_]+)(?: = [^`]*)?`", document.read_text(encoding="utf-8"))
    assert {f"{section}.{key}" for section, key in shown if section in sections} <= names.keys()


def test_files_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for word in re.findall(r"`([a-z_]+(?:/[a-z_]*)*(?:\.py)?)`", text):
        if "/" in word or word.endswith(".py"):
            assert (ROOT / "src" / "fallow" / word).exists() or (ROOT / word).exists(), word


def test_the_architecture_fits_its_page() -> None:
    assert len((ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) <= 100


def test_ci_runs_what_people_run() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script
    assert "make check" in script
    assert "make test" in script


def test_the_version_is_in_the_changelog_or_unreleased() -> None:
    from fallow import __version__

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{__version__}]" in text or "## [Unreleased]" in text
