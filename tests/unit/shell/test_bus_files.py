"""The files of an operator's own NATS server: whose they stay, and that root gives away no other file with them."""

import os
from pathlib import Path

import pytest

from fallow import private_file
from fallow.config import Config
from fallow.private_file import Owner, write_durably
from fallow.processes.operators_bus import configure, renew

NOBODY = Owner(65534, 65534)
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives files away")


def silent(_: str) -> None:
    pass


@as_root
def test_what_root_renews_in_a_folder_of_the_servers_user_stays_that_users_and_nothing_else_becomes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's user puts a link to another file there the moment that a new file has its name."""
    folder, victim = tmp_path / "bus", tmp_path / "roots-own"
    victim.write_text("x")
    config = Config(state_dir=tmp_path / "state")
    configure(config, folder, "127.0.0.1:4222", folder, silent)
    files = [folder / name for name in ("nats.conf", "bus.pem", "bus.key")]
    for path in (folder, *files):
        os.chown(path, *NOBODY)
    before = files[1].read_bytes()
    renew(config, folder)
    assert files[1].read_bytes() != before
    assert [path.stat().st_uid for path in files] == [NOBODY.user] * 3
    assert files[2].stat().st_mode & 0o777 == 0o600

    def racing(path: Path) -> None:
        for each in files[1:]:
            each.unlink(missing_ok=True)
            each.symlink_to(victim)

    monkeypatch.setattr(private_file, "_sync_folder", racing)  # the last step of a write, after the rename
    renew(config, folder)
    assert victim.stat().st_uid == os.geteuid() and victim.read_text() == "x"


@as_root
def test_a_link_in_a_files_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "bus"
    victim.write_text("x")
    config = Config(state_dir=tmp_path / "state")
    configure(config, folder, "127.0.0.1:4222", folder, silent)
    key = folder / "bus.key"
    key.unlink()
    key.symlink_to(victim)
    os.chown(key, *NOBODY, follow_symlinks=False)
    renew(config, folder)
    assert not key.is_symlink() and key.stat().st_uid == NOBODY.user
    assert victim.read_text() == "x" and victim.stat().st_uid == os.geteuid()


def test_a_file_is_its_writers_where_nobody_else_is_named(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"x")
    found = (tmp_path / "file").stat()
    assert (found.st_uid, found.st_mode & 0o777) == (os.geteuid(), 0o600)
