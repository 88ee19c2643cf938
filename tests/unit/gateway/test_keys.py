"""API keys: what is kept, what is compared, what is refused."""

import pytest

from fallow.domain.errors import ConfigError
from fallow.gateway.keys import OPEN_OWNER, ApiKey, KeyRing, hash_key, new_key
from fallow.gateway.problems import Problem
from fallow.policy.rate_limit import KeyLimits


class HandClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def unix_s(self) -> float:
        return self.now_s

    async def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


def test_new_keys_are_long_and_never_stored() -> None:
    secret, sha256 = new_key()
    assert secret.startswith("fallow-")
    assert len(secret) > 40
    assert sha256 == hash_key(secret)
    assert secret not in repr(KeyRing([ApiKey(id="a", sha256=sha256)], HandClock()).__dict__)


def test_open_without_keys() -> None:
    ring = KeyRing([], HandClock())
    assert ring.identify(None) == ring.identify("Bearer anything") == OPEN_OWNER
    ring.enter(OPEN_OWNER).release(10**9)
    ring.enter(OPEN_OWNER)


def test_each_key_is_its_owner() -> None:
    keys = {f"app{i}": new_key() for i in range(3)}
    ring = KeyRing([ApiKey(id=name, sha256=sha256) for name, (_, sha256) in keys.items()], HandClock())
    for name, (secret, _) in keys.items():
        assert ring.identify(f"Bearer {secret}") == name
        assert ring.identify(f"bearer  {secret} ") == name
    for bad in (None, "", "Bearer", "Bearer x", "Bearer \udcff", f"Bearer {'x' * 100_000}", keys["app0"][0]):
        with pytest.raises(Problem) as refusal:
            ring.identify(bad)
        assert refusal.value.status == 401


def test_limits_recover_with_time() -> None:
    clock = HandClock()
    _, sha256 = new_key()
    ring = KeyRing([ApiKey(id="a", sha256=sha256, limits=KeyLimits(requests_per_minute=1))], clock)
    ring.enter("a").release(5)
    with pytest.raises(Problem) as refusal:
        ring.enter("a")
    assert refusal.value.status == 429
    assert refusal.value.retry_after_s == pytest.approx(60)
    clock.now_s = 60.0
    ring.enter("a")


@pytest.mark.parametrize(
    "keys",
    [
        [ApiKey(id="a", sha256="ab" * 32), ApiKey(id="a", sha256="cd" * 32)],
        [ApiKey(id="a", sha256="xy" * 32)],
        [ApiKey(id="a", sha256="ab")],
        [ApiKey(id=str(i), sha256=f"{i:064x}") for i in range(1001)],
    ],
)
def test_unusable_configuration(keys: list[ApiKey]) -> None:
    with pytest.raises(ConfigError):
        KeyRing(keys, HandClock())
