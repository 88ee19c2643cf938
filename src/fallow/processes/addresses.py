"""Where the service is reached, and whether it may be: pure except for a look at the machine's routes."""

import socket

from fallow import wiring
from fallow.config import Config
from fallow.domain.errors import ConfigError


def check_exposure(config: Config) -> None:
    """Raises `ConfigError` for an API that would be open to the network."""
    if not config.gateway.keys and not wiring.is_loopback(config.gateway.host):
        raise ConfigError(
            f"gateway.host is {config.gateway.host}, which others can reach, and no API key is configured. "
            "Make one with `fallow key create`, put its lines into the configuration file, and start again."
        )


def api_url(config: Config) -> str:
    """Where clients on this machine reach the API."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.gateway.host, config.gateway.host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{config.gateway.port}"


def lan_address() -> str:
    """This machine's address towards its network, as far as its routes tell; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: only the route is looked up
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
