"""What nats-server is told: in trusted mode nothing that lets anybody in by a word, and no key that signs."""

from pathlib import Path

import msgspec
import pytest

from fallow.domain.errors import ConfigError
from fallow.fabric.broker_config import Passwords, TrustFiles, configuration, password_mode, trusted_mode
from tests.contract.networks import TestNetwork

NETWORK = TestNetwork()
TRUST = NETWORK.bus_trust()
FILES = TrustFiles(Path("/x/bus.pem"), Path("/x/bus.key"), Path("/x/accounts"))


def test_trusted_mode_knows_no_password_and_no_default_user() -> None:
    text = configuration(Path("/x"), "127.0.0.1:-1", trusted_mode(TRUST, FILES))
    for word in ("password", "no_auth_user", "users", "token", "allow_non_tls", "insecure", "verify_and_map"):
        assert word not in text
    assert "handshake_first: true" in text and 'min_version: "1.3"' in text and "allow_delete: false" in text
    for key in (NETWORK.operator, NETWORK.account, NETWORK.system):
        assert key.seed.hex() not in text
    assert "PRIVATE" not in text and "PRIVATE" not in repr(TRUST) and TRUST.account_jwt not in repr(TRUST)


def test_the_password_mode_speaks_of_passwords() -> None:
    text = password_mode(Passwords('a"b', "c"))
    assert '"a\\"b"' in text and "operator" not in text and "tls" not in text


@pytest.mark.parametrize("field", ["operator_jwt", "account_jwt", "system_account_jwt", "account", "system_account"])
@pytest.mark.parametrize("word", ["", 'x"\nno_auth_user: y', "a.b", "a.b.c }", "A" * 57, "U" + "A" * 55])
def test_a_word_that_could_be_configuration_is_refused(field: str, word: str) -> None:
    with pytest.raises(ConfigError):
        trusted_mode(msgspec.structs.replace(TRUST, **{field: word}), FILES)


@pytest.mark.parametrize("folder", ["/x/\N{CYRILLIC SMALL LETTER EF}/jose\N{COMBINING ACUTE ACCENT}", '/x/a "b"\\c'])
def test_a_path_stands_in_the_configuration_as_it_is_called(folder: str) -> None:
    text = configuration(Path(folder), "127.0.0.1:-1", password_mode(Passwords("a", "b")))
    assert "\\u" not in text
    assert "ports_file_dir: " + '"' + folder.replace("\\", "\\\\").replace('"', '\\"') + '"' in text


@pytest.mark.parametrize("folder", ["/x\nhttp: 8222", "/x\x00", "/x\udc80", "/x\x7f", "/x\u2028"])
def test_a_path_that_cannot_stand_in_the_configuration_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="do not print"):
        configuration(Path(folder), "127.0.0.1:-1", password_mode(Passwords("a", "b")))
    with pytest.raises(ConfigError, match="do not print"):
        trusted_mode(TRUST, TrustFiles.of(Path(folder)))
