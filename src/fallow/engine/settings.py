"""What an owner may set about the engine. Values only; sizes are per engine, all models together."""

import msgspec


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
