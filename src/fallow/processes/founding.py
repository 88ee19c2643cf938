"""A network's beginning, on the machine of who runs `fallow up` for the first time.

Rules
- Without a council, a council of one is made: its key, and a publisher's, lie in the state folder. `fallow council`
  makes it one of several people.
- Once founded, a network keeps its name, its cell and its keys. Founding again changes nothing.
- At its founding, and only then, the models that are in the store already are signed: they are the founder's.
"""

import platform
import time
from typing import Final

from fallow.config import Config
from fallow.models.store import Store
from fallow.processes.supervisor import Tell
from fallow.trust.council.files import CouncilPaths, found_council_of_one
from fallow.trust.council.publisher import publish_model
from fallow.trust.registrar.state import RegistrarState, found, is_founded, open_state

NAME_MAX_CHARS: Final = 64


def ensure_network(config: Config, tell: Tell) -> RegistrarState:
    """The network whose keys lie in the state folder; a new one when there is none. Raises `ConfigError`."""
    if is_founded(config.state_dir):
        renew_council(config)
        return open_state(config.state_dir)
    now_s = time.time()
    first_root = found_council_of_one(config.state_dir, _name(), now_s)
    state = found(config.state_dir, name=_name(), cell=config.cell, tuf_root=first_root, now_unix_s=now_s)
    store = Store(config.store_dir)
    for digest, _ in store.models():
        publish_model(config.state_dir, store.manifest_bytes(digest), now_s)
    tell(
        f"A new network, {state.network.name!r}, was founded, with a council of one: you. Its keys are in "
        f"{config.state_dir}; `fallow council` shares it with others."
    )
    return state


def renew_council(config: Config) -> None:
    """Sign a council of one's documents anew before they end; nothing where the council is elsewhere."""
    if CouncilPaths(config.state_dir).member_key.is_file():
        found_council_of_one(config.state_dir, _name(), time.time())


def _name() -> str:
    return (platform.node() or "home")[:NAME_MAX_CHARS]
