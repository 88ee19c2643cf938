"""Errors as API clients see them: an HTTP status and OpenAI's error object.

Named errors of the domain map to a status here and nowhere else. What is not named is an internal error: the client
learns a request id, not the message.
"""

import math

import msgspec

from fallow.domain.errors import (
    BadRequest,
    BusTimeout,
    BusUnavailable,
    ContextExceeded,
    FallowError,
    GrantRefused,
    KvExhausted,
    ModelError,
    NoRoute,
    NotWorking,
    StageRefused,
    UnknownModel,
)
from fallow.gateway.schema import ErrorBody, ErrorReply

RETRY_AFTER_S = 2.0
"""When to try again after a lack of capacity."""

RETRY_STOPPED_S = 30.0
"""When to try again while the network stands still."""

OVERLOADED = "overloaded"
"""The code of a refusal that is no failure: many may come, and none is worth a line in the log."""

_NO_CAPACITY = (NoRoute, KvExhausted, StageRefused, BusUnavailable, BusTimeout)


class Problem(Exception):
    """An error with everything that a reply needs."""

    def __init__(self, status: int, body: ErrorBody, retry_after_s: float | None = None) -> None:
        super().__init__(body.message)
        self.status = status
        self.body = body
        self.retry_after_s = retry_after_s

    def encoded(self) -> bytes:
        return msgspec.json.encode(ErrorReply(self.body))

    def headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"content-type", b"application/json")]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", str(max(1, math.ceil(self.retry_after_s))).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.status in (408, 413):
            # The rest of the body is still on its way; there is nothing sensible to read after it.
            headers.append((b"connection", b"close"))
        return headers


def problem_of(error: BaseException, request_id: str) -> Problem:
    """The reply to an error."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, UnknownModel):
        return Problem(404, _invalid(error, "model"))
    if isinstance(error, ContextExceeded):
        return Problem(400, _invalid(error, "messages"))
    if isinstance(error, BadRequest):
        return Problem(400, _invalid(error, error.param))
    if isinstance(error, NotWorking):
        body = ErrorBody(message=error.message, type="server_error", code=error.standing)
        return Problem(503, body, RETRY_STOPPED_S)
    if isinstance(error, GrantRefused):
        return Problem(403, ErrorBody(message=error.message, type="invalid_request_error", code=error.code))
    if isinstance(error, _NO_CAPACITY):
        return Problem(503, ErrorBody(message=error.message, type="server_error", code=error.code), RETRY_AFTER_S)
    if isinstance(error, ModelError):
        return Problem(500, ErrorBody(message=error.message, type="server_error", code=error.code))
    if isinstance(error, FallowError):
        message = f"The fleet failed to answer: {error.message}"
        return Problem(502, ErrorBody(message=message, type="server_error", code=error.code))
    message = f"Something went wrong inside Fallow. The logs say more under request id {request_id}."
    return Problem(500, ErrorBody(message=message, type="server_error", code="internal"))


def invalid_key(message: str) -> Problem:
    return Problem(401, ErrorBody(message=message, type="invalid_request_error", code="invalid_api_key"))


def foreign_host() -> Problem:
    """A 403 for a request by another name or origin, while no key is configured."""
    message = (
        "Without API keys this gateway answers only requests to localhost, and none from web pages of other origins. "
        "Configure an API key to use it under another name."
    )
    return Problem(403, ErrorBody(message=message, type="invalid_request_error", code="foreign_host"))


def rate_limited(message: str, kind: str, retry_after_s: float) -> Problem:
    return Problem(429, ErrorBody(message=message, type=kind, code="rate_limit_exceeded"), retry_after_s)


def overloaded(message: str, retry_after_s: float = RETRY_AFTER_S) -> Problem:
    return Problem(503, ErrorBody(message=message, type="server_error", code=OVERLOADED), retry_after_s)


def http_problem(status: int, message: str) -> Problem:
    """An error of HTTP itself: no such path, no such method, a body too large or too slow."""
    return Problem(status, ErrorBody(message=message, type="invalid_request_error"))


def _invalid(error: FallowError, param: str | None) -> ErrorBody:
    return ErrorBody(message=error.message, type="invalid_request_error", param=param, code=error.code)
