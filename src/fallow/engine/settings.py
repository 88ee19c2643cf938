"""What an owner may set about the engine. Values only; sizes are per engine, all models together."""

from enum import StrEnum

import msgspec


class Confinement(StrEnum):
    """What keeps the worker process away from the rest of the device. `engine/sandbox.py` says what each one covers."""

    BUBBLEWRAP = "bubblewrap"
    """Namespaces of its own (files, network, processes), and the system-call filter."""
    LANDLOCK = "landlock"
    """Linux without bubblewrap: kernel rules for files, and the system-call filter."""
    SEATBELT = "seatbelt"
    """macOS: a `sandbox-exec` profile."""
    NONE = "none"
    """Nothing but an empty environment. Where nothing else works, and for development."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the device the worker process may take. Defaults suit a device that somebody is working on."""

    kv_budget_bytes: int = 1 << 30
    """Upper bound of all KV reservations together."""
    threads: int = 1
    """Threads that compute one call."""
    niceness: int = 10
    """Added to the worker's scheduling priority; 0 leaves it as the agent's."""
    max_session_tokens: int = 8192
    """Longest session that is admitted, whatever the model's context."""
    slots_max: int = 64
    """Sessions of one model at a time."""
    hang_timeout_s: float = 2.0
    """Silence after which a worker that owes an answer, and neither computes nor waits for a processor, is given up."""
    silence_timeout_s: float = 120.0
    """Silence after which a worker that owes an answer is given up whatever it seems to do."""
    confinement: Confinement | None = None
    """`None`: the strongest that works here."""
    canary_interval_s: float = 60.0
    """How often every piece computes its known answer again, in turns; 0 never."""
    rehash_share: float = 0.005
    """The share of one core that hashing the weights' files again may take; 0 never. A gigabyte takes about 4 minutes
    on a core that hashes a gigabyte in a second."""
    rehash_rest_s: float = 300.0
    """Pause between two passes over all files."""
