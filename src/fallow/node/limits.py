"""How much of a machine a device gives: the owner's word, or a careful share of what is there."""

import msgspec
import psutil

from fallow.domain.errors import ConfigError

MEMORY_SHARE = 0.5
"""Of the memory that is free when the device starts, when the owner has said nothing."""
KV_SHARE = 0.25
"""Of what is allowed, for the KV cache, when the owner has said nothing."""
MEMORY_MIN_BYTES = 64 << 20


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a device may use. All else that it needs (the program itself) comes on top."""

    memory_bytes: int
    """Weights and KV cache together."""
    kv_budget_bytes: int
    """The part of it for the KV cache."""


def split_memory(memory_bytes: int | None, kv_budget_bytes: int | None) -> Memory:
    """The limits, with what the owner left open filled in. Raises `ConfigError` when they make no sense."""
    allowed = int(psutil.virtual_memory().available * MEMORY_SHARE) if memory_bytes is None else memory_bytes
    if allowed < MEMORY_MIN_BYTES:
        raise ConfigError(
            f"a device needs at least {MEMORY_MIN_BYTES >> 20} MiB to hold anything, and may use {allowed >> 20} MiB: "
            "raise node.memory_bytes"
        )
    kv = int(allowed * KV_SHARE) if kv_budget_bytes is None else kv_budget_bytes
    if not 0 < kv < allowed:
        raise ConfigError(
            f"node.kv_budget_bytes is {kv}, and must leave room for weights within node.memory_bytes, {allowed}"
        )
    return Memory(memory_bytes=allowed, kv_budget_bytes=kv)
