"""Settings: the order of rank, names, sizes, and what a person is told about a mistake."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.config import as_environment, load, setting_names, value_of
from fallow.domain.errors import ConfigError
from fallow.sizes import parse_size

NOWHERE: dict[str, str] = {}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and no settings of the user's own."""
    monkeypatch.setattr("platformdirs.user_config_dir", lambda name: str(tmp_path / "user"))
    return tmp_path


def write(folder: Path, text: str) -> None:
    (folder / "fallow.toml").write_text(text)


def test_each_source_beats_the_one_below_it(folder: Path) -> None:
    environment = {"FALLOW_GATEWAY_PORT": "2"}
    assert load({}, NOWHERE, folder=folder).sources["gateway.port"] == "default"
    write(folder, "[gateway]\nport = 1\n")
    assert load({}, NOWHERE, folder=folder).config.gateway.port == 1
    assert load({}, environment, folder=folder).config.gateway.port == 2
    loaded = load({"gateway.port": 3}, environment, folder=folder)
    assert loaded.config.gateway.port == 3
    assert loaded.sources["gateway.port"] == "a flag"


def test_a_flag_that_was_not_given_changes_nothing(folder: Path) -> None:
    write(folder, "[gateway]\nport = 1\n")
    assert load({"gateway.port": None}, NOWHERE, folder=folder).config.gateway.port == 1


def test_a_named_file_is_read_instead_of_the_folders(folder: Path) -> None:
    write(folder, "cell = 'here'\n")
    other = folder / "other.toml"
    other.write_text("cell = 'there'\n")
    assert load({}, NOWHERE, file=other, folder=folder).config.cell == "there"
    assert load({}, {"FALLOW_CONFIG": str(other)}, folder=folder).config.cell == "there"
    with pytest.raises(ConfigError, match="no configuration file"):
        load({}, NOWHERE, file=folder / "missing.toml", folder=folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[gateway]\nprot = 1\n", ["gateway.prot", "fallow.toml", "did you mean gateway.port"]),
        ("[gateway]\nport = 70000\n", ["gateway.port", "70000", "65535", "fallow.toml"]),
        ("[gateway]\nport = '1'x\n", ["fallow.toml", "line"]),
        ("[node]\nmemory_bytes = 'lots'\n", ["node.memory_bytes", "lots", "512MiB"]),
        ("[node]\nmemory_bytes = 0\n", ["node.memory_bytes", "0"]),
        ("[placement]\nmax_share = 1.5\n", ["placement.max_share", "1.5"]),
        ("local_nodes = true\n", ["local_nodes", "True"]),
        ("[gateway]\nstandby = 'maybe'\n", ["gateway.standby", "never, priority, always"]),
        ("[links]\nrelay = 'maybe'\n", ["links.relay", "auto, only, never"]),
        ("cell = 'a.b'\n", ["cell", "a.b"]),
        ("gateway = 3\n", ["gateway"]),
        ("[[gateway.keys]]\nid = 'a'\nsha256 = 'short'\n", ["gateway.keys", "sha256"]),
        ("[[gateway.keys]]\nid = 'a'\nsha256 = '%s'\nlimit = 3\n" % ("ab" * 32), ["gateway.keys", "limit"]),
    ],
)
def test_a_mistake_is_named(folder: Path, text: str, words: list[str]) -> None:
    write(folder, text)
    with pytest.raises(ConfigError) as caught:
        load({}, NOWHERE, folder=folder)
    for word in words:
        assert word in caught.value.message


def test_an_unknown_variable_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"FALLOW_GATEWAY_PRT.*FALLOW_GATEWAY_PORT"):
        load({}, {"FALLOW_GATEWAY_PRT": "1"}, folder=folder)


def test_a_secret_is_not_repeated_in_an_error(folder: Path) -> None:
    digest = "ab" * 31
    write(folder, f"[[gateway.keys]]\nid = 'a'\nsha256 = '{digest}'\n")
    with pytest.raises(ConfigError) as caught:
        load({}, NOWHERE, folder=folder)
    assert digest not in caught.value.message


@given(st.integers(0, 1 << 40), st.sampled_from(["", "B", "K", "KB", "KiB", "M", "MiB", "G", "GiB", "gib", " GiB"]))
def test_sizes_scale_with_their_unit(number: int, unit: str) -> None:
    size = parse_size(f"{number}{unit}")
    bare = unit.strip().upper()
    power = "BKMG".index(bare[0]) if bare else 0
    base = 1000 if bare.endswith("B") and not bare.endswith("IB") else 1024
    assert size == pytest.approx(number * base**power, rel=1e-12)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError:
        pass
    except OverflowError:
        pytest.fail("a size too large to hold must be refused as a value")


def settings() -> st.SearchStrategy[dict[str, Any]]:
    """Flags that are valid together, of every type."""
    return st.fixed_dictionaries(
        {},
        optional={
            "local_nodes": st.integers(0, 64),
            "gateway.port": st.integers(0, 65535),
            "gateway.host": st.sampled_from(["127.0.0.1", "0.0.0.0", "::1"]),
            "node.memory_bytes": st.integers(1, 1 << 50),
            "node.name": st.text("abc -_", min_size=1, max_size=9),
            "placement.max_share": st.floats(0.01, 1.0),
            "links.local_sockets": st.booleans(),
            "models.import_default": st.booleans(),
            "state_dir": st.sampled_from([Path("a"), Path("b/c")]),
        },
    )


@given(settings())
def test_another_process_gets_the_same_settings(flags: dict[str, Any]) -> None:
    here = load(flags, NOWHERE, folder=Path(os.devnull).parent).config
    there = load({}, as_environment(here), folder=Path(os.devnull).parent).config
    for name in setting_names():
        assert value_of(there, name) == value_of(here, name)


def test_every_default_reaches_another_process_unchanged(folder: Path) -> None:
    config = load({}, NOWHERE, folder=folder).config
    assert load({}, as_environment(config), folder=folder).config == config


def test_what_an_owner_declares_reaches_another_process_unchanged(folder: Path) -> None:
    write(folder, "[node]\nregion = 'north'\navailable = ['mon-fri 18:00-08:00', 'sat,sun 00:00-24:00']\n")
    config = load({}, NOWHERE, folder=folder).config
    assert config.node.available == ("mon-fri 18:00-08:00", "sat,sun 00:00-24:00")
    assert load({}, as_environment(config), folder=folder / "elsewhere").config.node == config.node
    assert load({"node.departs": "mon 07:45; fri 08:00"}, NOWHERE, folder=folder).config.node.departs == (
        "mon 07:45",
        "fri 08:00",
    )
    write(folder, "[node]\navailable = 'mon-fri 18:00-08:00'\nregion = 'no spaces'\n")
    with pytest.raises(ConfigError, match=r"node\.region"):
        load({}, NOWHERE, folder=folder)
