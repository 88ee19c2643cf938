"""Settings: where they come from, which one wins, and what each may be.

Rules
- Flags beat environment variables, which beat the file, which beats the defaults. Every value remembers its source.
- The file is TOML: the one named with `--config` or `FALLOW_CONFIG`, else `./fallow.toml`, else the user's
  (`platformdirs`). A file that was named and is not there is an error; one that was not named is optional.
- An environment variable is `FALLOW_` and the setting's name in capitals, with `_` for the dot: `gateway.port` is
  `FALLOW_GATEWAY_PORT`.
- A key or a value that makes no sense is a `ConfigError` that names the key, the value, what was expected and the
  source.
- Settings that end in `_bytes` take a number of bytes or a size with a unit, such as `"2GiB"`.

It opens nothing but the file, and looks at no hardware: what `None` means is decided where the setting is used.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
import platformdirs

from fallow.domain.errors import ConfigError
from fallow.domain.service import Standby
from fallow.policy.rate_limit import KeyLimits
from fallow.sizes import parse_size

ENV_PREFIX: Final = "FALLOW_"
FILE_NAME: Final = "fallow.toml"
FILE_MAX_BYTES: Final = 1 << 20
LIST_SEPARATOR: Final = ";"
"""Between the entries of a list that is given as text, in an environment variable or a flag."""
KEYS_MAX: Final = 1_000
SECRET_SETTINGS: Final = frozenset({"bus.url", "bus.system_url", "gateway.keys", "trust.invitation"})
"""Never shown in full: urls may hold passwords, and whoever has an invitation can use it."""

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Bytes = Annotated[int, msgspec.Meta(ge=1)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
CellName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,32}$")]
Region = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
Declarations = Annotated[tuple[Annotated[str, msgspec.Meta(max_length=100)], ...], msgspec.Meta(max_length=50)]
KeyHash = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class BusConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The control bus: where `fallow up` starts it, or where it is."""

    host: str = "127.0.0.1"
    """Interface to listen on. `0.0.0.0` accepts devices of the network, and makes links listen there as well."""
    port: Port = 0
    """0: any free one at the first start, and the same one ever after."""
    url: str | None = None
    """An operator's own NATS to use instead of starting one; for `fallow join`, the bus to join."""
    system_url: str | None = None
    """With an own NATS: its system account, whose events tell at once when a device's connection breaks."""


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A client's key, as the file holds it: never the key itself."""

    id: str
    sha256: KeyHash
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent_requests: Count | None = None

    @property
    def limits(self) -> KeyLimits:
        return KeyLimits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            concurrent_requests=self.concurrent_requests,
        )


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The OpenAI-compatible API."""

    host: str = "127.0.0.1"
    port: Port = 8484
    """0: any free one."""
    links: str | None = None
    """`ip:port` to listen on for devices that fetch model files; `None`: as `node.listen` has it."""
    keys: Annotated[tuple[ApiKey, ...], msgspec.Meta(max_length=KEYS_MAX)] = ()
    """Without any, everyone who reaches the port may ask."""
    wait_max_s: Annotated[float, msgspec.Meta(gt=0, le=300)] = 10.0
    """How long a request may wait for its turn; one that would wait longer is told at once when to come again."""
    waiting_max: Count = 512
    """Requests that may wait at once."""
    answers_max: Count = 256
    """Answers that may be generated at once, however well the devices bear it."""
    run_ahead: bool = True
    """Devices go on with the token that the gateway is going to choose, before they hear of it."""
    standby: Standby = Standby.PRIORITY
    """For which answers another chain, of idle devices, stands by: `never`, `priority` (those that ask), `always`."""


class PlacementConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How models are spread over devices."""

    max_share: Share = 1.0
    """No device does more than this share of a model's work: its layers, and the head by its size."""
    replicas: Count = 2
    """Devices that should hold each piece of a model that is cut."""
    context_tokens: Count = 2048
    """A device must have room for a session of so many tokens."""
    regions: Annotated[tuple[Region, ...], msgspec.Meta(max_length=50)] = ()
    """Models stay on devices whose owners say that they are in one of these (`node.region`); none: anywhere."""


class CoordinatorsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who knows the devices, places models and routes."""

    standbys: Annotated[int, msgspec.Meta(ge=0, le=4)] = 1
    """Coordinators that `fallow up` starts besides the one that leads; one takes over when that is lost."""
    name: str | None = None
    """What people call this one; `None`: the host's name."""


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A device that works."""

    name: str | None = None
    """`None`: the host's name."""
    memory_bytes: Bytes | None = None
    """Weights and KV cache together; `None`: half of the machine's memory."""
    kv_budget_bytes: Bytes | None = None
    """The part of it for the KV cache; `None`: a quarter of it."""
    threads: Count | None = None
    """`None`: one for each core."""
    listen: str | None = None
    """`ip:port` for links; `None`: loopback when the bus is there at the start, else every interface, any port."""
    region: Region | None = None
    """Where the device is, for models that must stay in a region; `None`: not said."""
    available: Declarations = ()
    """When it is usually free, such as `"mon-fri 18:00-08:00"`: evidence for how long it will stay, no restriction."""
    departs: Declarations = ()
    """When it usually leaves, such as `"mon-fri 07:45"` for a car."""
    nearest_cell: bool = False
    """Be in whichever cell on the bus is nearest and has room, and move when another is; where alike, in `cell`."""


class LinksConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Links between devices and gateways."""

    local_sockets: bool = True
    """Processes of one user on one machine talk through a private Unix socket; `false`: encrypted, as elsewhere."""
    relay: Literal["auto", "only", "never"] = "auto"
    """Sealed frames over the bus: where no direct path exists, always, or never."""


class RegistrarConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who admits devices, and hands out the council's word."""

    host: str | None = None
    """Interface to listen on; `None`: that of the bus."""
    port: Port = 0
    """0: any free one at the first start, and the same one ever after."""


class TrustConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who gets in."""

    invitation: str | None = None
    """For a process that has not been admitted yet; used once, then of no use to anybody."""
    insecure_development: bool = False
    """No credentials, no TLS on the bus, no grants, no lease, no sandbox: for work on Fallow itself, on loopback."""


class ModelsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `fallow up` serves."""

    import_default: bool = True
    """Import the default model when the store is empty."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. `None` means: decided from the machine, where it is used."""

    state_dir: Path = Path(platformdirs.user_data_dir("fallow"))
    """Identities, models, the bus's password. Nothing else on the disk is written."""
    cell: CellName = "home"
    """The name of the group of devices that share a coordinator."""
    local_nodes: Annotated[int, msgspec.Meta(ge=0, le=64)] = 0
    """Devices that `fallow up` starts on this machine."""
    bus: BusConfig = BusConfig()
    gateway: GatewayConfig = GatewayConfig()
    placement: PlacementConfig = PlacementConfig()
    coordinator: CoordinatorsConfig = CoordinatorsConfig()
    node: NodeConfig = NodeConfig()
    links: LinksConfig = LinksConfig()
    registrar: RegistrarConfig = RegistrarConfig()
    trust: TrustConfig = TrustConfig()
    models: ModelsConfig = ModelsConfig()

    @property
    def store_dir(self) -> Path:
        """The operator's models."""
        return self.state_dir / "models"

    @property
    def device_dir(self) -> Path:
        """What a device keeps: its identity and its parts of models, apart from the operator's."""
        return self.state_dir / "device"


class Loaded(msgspec.Struct, frozen=True):
    """Settings and where each came from, by dotted name."""

    config: Config
    sources: dict[str, str]
    file: Path | None


def load(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
    folder: Path | None = None,
) -> Loaded:
    """Read the settings. `flags` maps dotted names to values; `None` there means that the flag was not given.

    Raises `ConfigError`.
    """
    names = setting_names()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    path = _find_file(file, environ, folder or Path.cwd())
    given = [] if path is None else [(name, value, f"the file {path.name}") for name, value in _read_file(path, names)]
    given += _read_environment(environ, names)
    given += [(name, value, "a flag") for name, value in (flags or {}).items() if value is not None]
    for name, value, source in given:
        values[name] = _parse(name, value, names[name], source)
        sources[name] = source
    return Loaded(_build(values), {name: sources.get(name, "default") for name in names}, path)


def setting_names() -> dict[str, Any]:
    """Every setting's dotted name and type."""
    return dict(_walk(Config, ""))


def value_of(config: Config, name: str) -> Any:
    """The value behind a dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def as_environment(config: Config) -> dict[str, str]:
    """Environment variables that make another process have the same settings; API keys are left to the file."""
    values = {name: value_of(config, name) for name in setting_names() if name != "gateway.keys"}
    return {_variable(name): _as_text(value) for name, value in values.items() if value is not None}


def _variable(name: str) -> str:
    return ENV_PREFIX + name.upper().replace(".", "_")


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return LIST_SEPARATOR.join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _walk(struct: type[msgspec.Struct], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, kind in get_type_hints(struct, include_extras=True).items():
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield from _walk(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _find_file(named: Path | None, environ: Mapping[str, str], folder: Path) -> Path | None:
    named = named or (Path(environ["FALLOW_CONFIG"]) if environ.get("FALLOW_CONFIG") else None)
    if named is not None:
        if not named.is_file():
            raise ConfigError(f"There is no configuration file {str(named)!r}; check --config or FALLOW_CONFIG.")
        return named
    places = (folder / FILE_NAME, Path(platformdirs.user_config_dir("fallow")) / FILE_NAME)
    return next((place for place in places if place.is_file()), None)


def _read_file(path: Path, names: Mapping[str, Any]) -> list[tuple[str, Any]]:
    try:
        content = path.read_bytes()
        if len(content) > FILE_MAX_BYTES:
            raise ConfigError(f"The file {path.name} is larger than {FILE_MAX_BYTES} bytes: that is no configuration.")
        table = tomllib.loads(content.decode())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The file {path.name} cannot be read: {error}.") from error
    return list(_flatten(table, "", names, path.name))


def _flatten(table: Mapping[str, Any], prefix: str, names: Mapping[str, Any], file: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if name in names:
            yield name, value
        elif isinstance(value, dict) and any(known.startswith(f"{name}.") for known in names):
            yield from _flatten(value, f"{name}.", names, file)
        else:
            raise ConfigError(f"{name} in the file {file} is not a setting; {_nearest(name, names)}.")


def _read_environment(environ: Mapping[str, str], names: Mapping[str, Any]) -> list[tuple[str, Any, str]]:
    variables = {_variable(name): name for name in names}
    found: list[tuple[str, Any, str]] = []
    for variable, text in environ.items():
        if not variable.startswith(ENV_PREFIX) or variable in _OTHER_VARIABLES:
            continue
        if variable not in variables:
            raise ConfigError(f"The environment variable {variable} is not a setting; {_nearest(variable, variables)}.")
        found.append((variables[variable], text, f"the environment variable {variable}"))
    return found


_OTHER_VARIABLES: Final = frozenset({"FALLOW_CONFIG", "FALLOW_API_KEY", "FALLOW_URL"})
"""Variables of ours that are not settings."""


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(names), n=1)
    return f"did you mean {close[0]}" if close else "`fallow config show` lists the settings"


def _parse(name: str, value: Any, kind: Any, source: str) -> Any:
    if name.endswith("_bytes") and isinstance(value, str):
        try:
            value = parse_size(value)
        except ValueError as error:
            raise ConfigError(f"{name} from {source}: {error}.") from error
    if _is_texts(kind) and isinstance(value, str):
        value = [part.strip() for part in value.split(LIST_SEPARATOR) if part.strip()]
        return _convert(name, value, kind, source)
    if isinstance(value, Path):
        value = str(value)
    if _is_path(kind) and isinstance(value, str):
        return Path(value).expanduser()
    return _convert(name, value, kind, source)


def _convert(name: str, value: Any, kind: Any, source: str) -> Any:
    try:
        # Environment variables are text; numbers and truth values in them are meant as such.
        return msgspec.convert(value, kind, strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        shown = "[…]" if name in SECRET_SETTINGS else repr(value)
        why = _lower(str(error)) if _choices(kind) is None else f"expected one of {_choices(kind)}"
        raise ConfigError(f"{name} = {shown} from {source} cannot be used: {why}.") from error


def _choices(kind: Any) -> str | None:
    """What a setting that is one of a few words may be."""
    words = [item.value for item in kind] if isinstance(kind, type) and issubclass(kind, Enum) else get_args(kind)
    return ", ".join(words) if words and all(isinstance(word, str) for word in words) else None


def _is_texts(kind: Any) -> bool:
    """Whether a setting is a list of texts, such as `node.available`."""
    items = _bare(kind)
    return get_origin(items) is tuple and _bare(get_args(items)[0]) is str


def _bare(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _is_path(kind: Any) -> bool:
    return kind is Path or (get_origin(kind) is not None and Path in get_args(kind))


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _build(values: Mapping[str, Any]) -> Config:
    top: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, dot, key = name.partition(".")
        if dot:
            nested.setdefault(section, {})[key] = value
        else:
            top[section] = value
    kinds = get_type_hints(Config)
    return Config(**top, **{section: kinds[section](**fields) for section, fields in nested.items()})
