"""The scenarios that come with Fallow, by name, and how a scenario is found: by its name here, or as a file."""

from importlib import resources
from pathlib import Path

from fallow.domain.errors import ConfigError
from fallow.simulator.scenario import SCENARIO_MAX_BYTES, Scenario, decode_scenario

SUFFIX = ".toml"


def names() -> tuple[str, ...]:
    """The names of all shipped scenarios."""
    folder = resources.files("fallow.simulator") / "scenarios"
    return tuple(sorted(item.name.removesuffix(SUFFIX) for item in folder.iterdir() if item.name.endswith(SUFFIX)))


def read(name_or_path: str) -> str:
    """A scenario's text. Raises `ConfigError` when it is neither a name nor a readable file."""
    if name_or_path in names():
        return (resources.files("fallow.simulator") / "scenarios" / (name_or_path + SUFFIX)).read_text("utf-8")
    path = Path(name_or_path).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(SCENARIO_MAX_BYTES + 1)
        if len(data) > SCENARIO_MAX_BYTES:
            raise ConfigError(f"{path}: a scenario has at most {SCENARIO_MAX_BYTES} bytes")
        return data.decode()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(names())
        raise ConfigError(
            f"{name_or_path}: neither a shipped scenario ({known}) nor a readable file: {error}"
        ) from error


def scenario(name_or_path: str) -> Scenario:
    """A shipped scenario, or one in a file. Raises `ConfigError`."""
    return decode_scenario(read(name_or_path), name_or_path)
