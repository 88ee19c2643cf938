"""A lease key over NATS: one key of a JetStream bucket, laid out as NATS's key-value stores are.

Rules
- A bucket holds the newest value of each key, in a file, and drops it after the time to live. An existing bucket is
  used as it is, so that an operator may have made it with replicas.
- The first revision of a new bucket is the time in milliseconds: also where the server lost its store, revisions go on
  rising, unless its clock was set back.
- Reads ask the stream's leader, never a replica that may lag.
- Watching is an ordinary subscription to the key's subject. It survives reconnections, costs the server no consumer,
  and also hears of writes that were refused, which is why it is a hint only.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import api

from fallow.domain.errors import BusTimeout, BusUnavailable, LeaseUnsupported
from fallow.fabric.contract import LeaseEntry
from fallow.fabric.nats_bus import NatsBus, NatsSubscription
from fallow.fabric.nats_client import CONNECT_TIMEOUT_S, settle

REQUEST_TIMEOUT_S: Final = 1.0
"""A writer that waits longer than this has little of its lease left."""
KEYS_MAX: Final = 16
VALUE_BYTES_MAX: Final = 4096
OPEN_TRIES_MAX: Final = 3
OPEN_RETRY_S: Final = 0.2

_WRONG_SEQUENCE: Final = (10071, 10164)
_NOT_ENABLED: Final = (10039, 10076)
_NAME_IN_USE: Final = (10058, 10148)

log = logging.getLogger(__name__)


class NatsLease:
    """A `LeaseKey` on a NATS server with JetStream. Make one with `open`."""

    def __init__(self, client: Client, bucket: str, key: str, ttl_s: float) -> None:
        self._client = client
        self._stream = f"KV_{bucket}"
        self._subject = f"$KV.{bucket}.{key}"
        self._ttl_s = ttl_s
        self._jetstream = client.jetstream(timeout=REQUEST_TIMEOUT_S)

    @classmethod
    async def open(cls, bus: NatsBus, bucket: str, key: str, ttl_s: float) -> "NatsLease":
        """The key, its bucket made if need be. Raises `LeaseUnsupported`, `BusTimeout`, `BusUnavailable`."""
        lease = cls(bus.client, bucket, key, ttl_s)
        for tried in range(1, OPEN_TRIES_MAX + 1):
            try:
                await lease._make_bucket()
                return lease
            except LeaseUnsupported:
                # A server that has just started answers for JetStream a moment after it takes connections.
                if tried == OPEN_TRIES_MAX:
                    raise
                await asyncio.sleep(OPEN_RETRY_S)
        raise AssertionError

    @property
    def connection(self) -> int | None:
        return int(self._client.stats["reconnects"]) if self._client.is_connected else None

    async def read(self) -> LeaseEntry | None:
        try:
            message = await self._jetstream.get_msg(self._stream, subject=self._subject, direct=False)
        except nats.js.errors.NotFoundError:
            return None  # nothing there, or not even a bucket
        except nats.errors.Error as error:
            raise _named(error, "read") from None
        return LeaseEntry(int(message.seq or 0), message.data or b"")

    async def write(self, value: bytes, after: int) -> int | None:
        assert len(value) <= VALUE_BYTES_MAX
        try:
            return await self._write(value, after)
        except nats.js.errors.NoStreamResponseError:
            await self._make_bucket()
        try:
            return await self._write(value, after)
        except nats.js.errors.NoStreamResponseError:
            raise BusUnavailable("the bucket of the lease takes no writes at present") from None

    async def watch(self, on_write: Callable[[], None]) -> NatsSubscription:
        async def heard(_: Msg) -> None:
            on_write()

        try:
            subscription = await self._client.subscribe(self._subject, cb=heard)
            if self._client.is_connected:
                with contextlib.suppress(nats.errors.TimeoutError):
                    await settle(self._client, CONNECT_TIMEOUT_S)
        except nats.errors.Error as error:
            raise BusUnavailable(f"cannot watch the lease: {error}") from None
        return NatsSubscription(subscription)

    # --- inside ---

    async def _write(self, value: bytes, after: int) -> int | None:
        if not self._client.is_connected:
            # nats-py would keep it and send it when it is too late.
            raise BusUnavailable("the control bus is not connected; it is being retried")
        headers = {str(api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value): str(after)}
        try:
            return int((await self._jetstream.publish(self._subject, value, headers=headers)).seq)
        except nats.js.errors.NoStreamResponseError:
            raise
        except nats.js.errors.APIError as error:
            if error.err_code in _WRONG_SEQUENCE:
                return None
            raise _named(error, "write") from None
        except nats.errors.Error as error:
            raise _named(error, "write") from None

    async def _make_bucket(self) -> None:
        config = api.StreamConfig(
            name=self._stream,
            subjects=[self._subject.rpartition(".")[0] + ".>"],
            storage=api.StorageType.FILE,
            discard=api.DiscardPolicy.NEW,
            max_msgs_per_subject=1,
            max_msgs=KEYS_MAX,
            max_msg_size=VALUE_BYTES_MAX * 2,  # headers count
            max_age=self._ttl_s,
            duplicate_window=self._ttl_s,
            first_seq=int(time.time() * 1000),
            allow_direct=True,
            allow_rollup_hdrs=True,
            deny_delete=True,
        )
        try:
            try:
                await self._jetstream.stream_info(self._stream)
            except nats.js.errors.NotFoundError:
                await self._jetstream.add_stream(config)
                log.info("made the bucket %s for leases of %.1f s", self._stream, self._ttl_s)
        except nats.js.errors.APIError as error:
            if error.err_code in _NAME_IN_USE:
                return  # another process made it in the same moment
            raise _named(error, "open") from None
        except nats.errors.Error as error:
            raise _named(error, "open") from None


def _named(error: Exception, doing: str) -> BusTimeout | BusUnavailable | LeaseUnsupported:
    """nats-py's errors as ours."""
    if isinstance(error, nats.errors.TimeoutError):
        return BusTimeout(f"cannot {doing} the lease: no answer within {REQUEST_TIMEOUT_S} s")
    if isinstance(error, nats.js.errors.APIError) and error.err_code in _NOT_ENABLED:
        return LeaseUnsupported(f"the control bus has no JetStream ({error.description})")
    if doing == "open" and isinstance(error, nats.js.errors.ServiceUnavailableError) and error.err_code is None:
        return LeaseUnsupported("the control bus has no JetStream: nobody answers for it")
    return BusUnavailable(f"cannot {doing} the lease: {error}")
