"""Where things listen, and what must not be open to the network."""

import pytest

from fallow import wiring
from fallow.config import ApiKey, Config, load
from fallow.domain.errors import ConfigError
from fallow.processes.addresses import api_url, check_exposure, lan_address
from fallow.processes.registrar import _reached

KEY = ApiKey(id="a", sha256="ab" * 32)


def config(**flags: object) -> Config:
    return load({name.replace("__", "."): value for name, value in flags.items()}, {}, file=None).config


LOCAL_URL, FAR_URL = "tls://127.0.0.1:4222", "tls://192.0.2.7:4222"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, wiring.LOOPBACK_LINKS),
        ({"bus__url": "nats://fallow:x@127.0.0.1:4222"}, wiring.LOOPBACK_LINKS),
        ({"bus__url": "nats://fallow:x@localhost:4222"}, wiring.LOOPBACK_LINKS),
        ({"bus__url": "nats://fallow:x@192.168.1.10:4222"}, wiring.OPEN_LINKS),
        # The service's own devices reach its bus on loopback, and must be reachable all the same.
        ({"bus__url": "nats://fallow:x@127.0.0.1:4222", "bus__host": "0.0.0.0"}, wiring.OPEN_LINKS),
    ],
)
def test_links_listen_where_the_bus_is_reached(flags: dict[str, object], expected: str) -> None:
    assert wiring.link_address(config(**flags), None, ()) == expected
    assert wiring.link_address(config(**flags), "10.0.0.1:7", ()) == "10.0.0.1:7"


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ((LOCAL_URL,), wiring.LOOPBACK_LINKS),
        (("tls://[::1]:4222", "tls://localhost:4222"), wiring.LOOPBACK_LINKS),
        ((FAR_URL,), wiring.OPEN_LINKS),
        (("tls://bus.example.org:4222",), wiring.OPEN_LINKS),
        # Others come from afar, whoever is on the bus's own machine.
        ((FAR_URL, LOCAL_URL), wiring.OPEN_LINKS),
        ((LOCAL_URL, FAR_URL), wiring.OPEN_LINKS),
    ],
)
def test_who_has_the_bus_from_the_registrar_listens_for_links_as_that_says(
    told: tuple[str, ...], expected: str
) -> None:
    """A device that joined by an invitation has no bus in its settings."""
    assert wiring.link_address(config(), None, told) == expected
    assert wiring.link_address(config(), "10.0.0.1:7", told) == "10.0.0.1:7"


def test_a_bus_in_the_settings_is_the_one_that_counts() -> None:
    """It is the one that is joined."""
    assert wiring.link_address(config(bus__url=LOCAL_URL), None, (FAR_URL,)) == wiring.LOOPBACK_LINKS
    assert wiring.link_address(config(bus__url=FAR_URL), None, (LOCAL_URL,)) == wiring.OPEN_LINKS


@pytest.mark.parametrize("text", ["7000", "host", ":7000", "0.0.0.0:", "0.0.0.0:seven", "0.0.0.0:70000", "0.0.0.0:²"])
def test_an_address_for_links_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0:7000"):
        wiring.split_address(text)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.10", "some-name"])
def test_an_open_api_needs_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="fallow key create"):
        check_exposure(config(gateway__host=host))
    check_exposure(config(gateway__host=host, gateway__keys=(KEY,)))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.7"])
def test_on_loopback_none_is_needed(host: str) -> None:
    check_exposure(config(gateway__host=host))


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:1"), ("0.0.0.0", "http://127.0.0.1:1"), ("::", "http://[::1]:1")],
)
def test_the_url_is_one_that_works_here(host: str, url: str) -> None:
    assert api_url(config(gateway__host=host, gateway__port=1)) == url


def test_the_lan_address_is_an_address() -> None:
    assert lan_address()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "192.168.1.5"])
def test_a_bus_on_another_machine_is_reached_there_by_everybody(host: str) -> None:
    """Wherever this machine listens itself."""
    assert _reached(host, "tls://bus.example.org:4222") == ("tls://bus.example.org:4222",)
    assert _reached(host, "tls://127.0.0.1:4222")[0].startswith("tls://127.0.0.1") == (host == "127.0.0.1")
