"""The OpenAI-compatible API as an ASGI app.

A generating request goes: key → body → plan → prompt tokens → place → choices → reply. It may wait for its place, or be
told when to come again (`admission.py`). Whatever it took (a place, the key's concurrency) is given back in every case,
and the key is charged for what was really generated. A client that hangs up leaves the queue and cancels its choices.
Errors before the first token have their own status; later ones are an event in the stream, which then ends. No CORS
headers are sent.
"""

import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fallow.domain.clock import Clock
from fallow.domain.errors import BadRequest, ContextExceeded, KvExhausted
from fallow.domain.service import ServiceTier
from fallow.gateway.admission import Admission
from fallow.gateway.contract import TokenSource
from fallow.gateway.generation import ChoiceSpec, Chunk, Tally, generate, generate_all
from fallow.gateway.keys import ApiKey, KeyRing, Lease
from fallow.gateway.metrics import GatewayMetrics
from fallow.gateway.prepared import Prepared
from fallow.gateway.problems import OVERLOADED, Problem, foreign_host, http_problem, problem_of
from fallow.gateway.replies import ChatAnswer, CompletionAnswer, Envelope
from fallow.gateway.requests import (
    MAX_CHOICES,
    Plan,
    decode_request,
    plan_chat,
    plan_completion,
    prompts_of,
    template_messages,
)
from fallow.gateway.schema import (
    ChatRequest,
    CompletionRequest,
    ModelCard,
    ModelList,
)
from fallow.gateway.text import TextModel, TextModels, TokenizerFile
from fallow.gateway.wire import (
    ClientGone,
    EventStream,
    header,
    is_local,
    read_body,
    send_json,
    send_problem,
    unless_disconnected,
)
from fallow.policy.admission import AdmissionRules

_LOG = logging.getLogger(__name__)


class ApiLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of the whole API, whoever asks."""

    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 20.0
    default_max_new_tokens: int = 1024
    """For chats that name no limit; the room left in the context if that is less."""


Prepare = Callable[[bytes, str], Awaitable[Prepared]]
"""From a body and a request id to what is to be generated."""


def create_app(
    source: TokenSource,
    tokenizer_file: TokenizerFile,
    clock: Clock,
    keys: Iterable[ApiKey] = (),
    limits: ApiLimits | None = None,
    metrics: GatewayMetrics | None = None,
    entropy: Callable[[], int] = lambda: secrets.randbits(64),
    admission: AdmissionRules | None = None,
) -> Starlette:
    """The app. `entropy` gives 64 random bits, for ids and for choices without a seed.

    Raises `ConfigError` for unusable keys.
    """
    metrics = metrics or GatewayMetrics()
    door = Admission(admission or AdmissionRules(), clock, metrics)
    gateway = _Gateway(
        source, tokenizer_file, clock, KeyRing(keys, clock), limits or ApiLimits(), metrics, entropy, door
    )
    routes = [
        Route("/health", _Endpoint(gateway, gateway.health), methods=["GET"]),
        Route("/metrics", _Endpoint(gateway, gateway.show_metrics), methods=["GET"]),
        Route("/v1/models", _Endpoint(gateway, gateway.list_models), methods=["GET"]),
        Route("/v1/models/{model:path}", _Endpoint(gateway, gateway.show_model), methods=["GET"]),
        Route("/v1/chat/completions", _Endpoint(gateway, gateway.chat), methods=["POST"]),
        Route("/v1/completions", _Endpoint(gateway, gateway.complete), methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error})
    app.router.redirect_slashes = False
    return app


class _Gateway:
    def __init__(
        self,
        source: TokenSource,
        tokenizer_file: TokenizerFile,
        clock: Clock,
        keys: KeyRing,
        limits: ApiLimits,
        metrics: GatewayMetrics,
        entropy: Callable[[], int],
        door: Admission,
    ) -> None:
        self._source = source
        self._clock = clock
        self._keys = keys
        self._limits = limits
        self.metrics = metrics
        self.entropy = entropy
        self._door = door
        self._started_unix_s = int(clock.unix_s())
        self._models = TextModels(source.models, tokenizer_file, lambda: datetime.fromtimestamp(clock.unix_s()))

    def _identify(self, scope: Scope) -> str:
        """Who asks. Raises a 401 or 403 `Problem`."""
        if self._keys.open and not is_local(scope):
            raise foreign_host()
        return self._keys.identify(header(scope, b"authorization"))

    # --- plain endpoints --------------------------------------------------------------------------

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, msgspec.json.encode({"status": "ok", "models": len(self._source.models())}))

    async def show_metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        content_type = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
        body = self.metrics.exposition()
        await send({"type": "http.response.start", "status": 200, "headers": [content_type]})
        await send({"type": "http.response.body", "body": body})

    async def list_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._identify(scope)
        cards = [ModelCard(id=each.name, created=self._started_unix_s) for each in self._source.models()]
        await send_json(send, msgspec.json.encode(ModelList(data=cards)))

    async def show_model(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._identify(scope)
        model = await self._models.get(scope["path_params"]["model"])
        card = ModelCard(id=model.manifest.name, created=self._started_unix_s)
        await send_json(send, msgspec.json.encode(card))

    # --- generating endpoints -----------------------------------------------------------------------

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(scope, receive, send, self._prepare_chat)

    async def complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._generate(scope, receive, send, self._prepare_completion)

    async def _generate(self, scope: Scope, receive: Receive, send: Send, prepare: Prepare) -> None:
        lease = self._keys.enter(self._identify(scope))
        tallies: list[Tally] = []
        prompt_tokens = 0
        try:
            body = await read_body(scope, receive, self._limits.max_body_bytes, self._limits.body_timeout_s)
            prepared = await prepare(body, scope["state"]["request_id"])
            prompt_tokens = prepared.prompt_tokens
            tallies.extend(Tally() for _ in prepared.prompts)
            await self._answer(scope, receive, send, prepared, tallies, lease)
        finally:
            completion_tokens = sum(tally.completion_tokens for tally in tallies)
            lease.release(prompt_tokens + completion_tokens if completion_tokens else 0)

    async def _answer(
        self, scope: Scope, receive: Receive, send: Send, prepared: Prepared, tallies: list[Tally], lease: Lease
    ) -> None:
        try:
            work = self._in_turn(send, prepared, tallies, lease.owner, scope["state"]["request_id"])
            await unless_disconnected(receive, work)
        finally:
            if any(tally.completion_tokens for tally in tallies):
                usage = prepared.usage(tallies)
                self.metrics.prompt_tokens.inc(usage.prompt_tokens)
                self.metrics.cached_tokens.inc(usage.prompt_tokens_details.cached_tokens)

    async def _in_turn(self, send: Send, prepared: Prepared, tallies: list[Tally], owner: str, request_id: str) -> None:
        """Wait for a place, then generate."""
        run = self._stream if prepared.plan.streamed else self._whole
        count = len(prepared.prompts)
        async with self._door.place(owner, count, prepared.prompt_tokens) as place:
            self.metrics.choices_changed(count)
            try:
                await run(send, prepared, tallies, owner, request_id)
            except KvExhausted:
                self._door.no_room(count)
                raise
            finally:
                self.metrics.choices_changed(-count)
                place.tokens = sum(tally.completion_tokens for tally in tallies)

    async def _whole(self, send: Send, prepared: Prepared, tallies: list[Tally], owner: str, request_id: str) -> None:
        async def emit(chunk: Chunk) -> None:
            prepared.answer.collect(chunk)

        await self._generate_choices(prepared, tallies, owner, emit)
        await send_json(send, prepared.answer.reply(prepared.usage(tallies)))

    async def _stream(self, send: Send, prepared: Prepared, tallies: list[Tally], owner: str, request_id: str) -> None:
        stream = EventStream(send)

        async def emit(chunk: Chunk) -> None:
            for event in prepared.answer.events(chunk):
                await stream.event(event)

        try:
            await self._generate_choices(prepared, tallies, owner, emit)
        except Exception as error:
            if not stream.started:
                raise
            problem = self.refused(error, request_id)
            await stream.event(problem.encoded())
        else:
            if prepared.plan.usage_in_stream:
                await stream.event(prepared.answer.usage_event(prepared.usage(tallies)))
        await stream.end()

    async def _generate_choices(
        self, prepared: Prepared, tallies: list[Tally], owner: str, emit: Callable[[Chunk], Awaitable[None]]
    ) -> None:
        plan = prepared.plan
        seed = self.entropy() if plan.sampling.seed is None else plan.sampling.seed
        choices = []
        for index, (prompt, tally) in enumerate(zip(prepared.prompts, tallies, strict=True)):
            spec = ChoiceSpec(
                index=index,
                prompt=prompt,
                max_new_tokens=prepared.max_new_tokens,
                sampling=plan.sampling,
                seed=seed,
                stops=plan.stops,
                top_logprobs=plan.top_logprobs,
                owner=owner,
                keep=index % plan.choices == 0,
                tier=plan.tier or ServiceTier.DEFAULT,
            )
            choices.append(generate(self._source, prepared.model, spec, tally, emit, self._clock, self._door))
        await generate_all(choices)

    # --- preparing ------------------------------------------------------------------------------------

    async def _prepare_chat(self, body: bytes, request_id: str) -> Prepared:
        request = decode_request(body, ChatRequest)
        plan = plan_chat(request)
        messages = template_messages(request.messages)
        model = await self._models.get(plan.model)
        if model.template is None:
            raise BadRequest(f"The model {plan.model!r} has no chat template; use /v1/completions.", "model")
        prompt = await model.encode_chat(model.template.render(messages, request.chat_template_kwargs))
        envelope = self._envelope(plan, model, f"chatcmpl-{request_id}")
        return Prepared(
            plan=plan,
            model=model,
            prompts=[prompt] * plan.choices,
            max_new_tokens=self._room(plan, model, [prompt]),
            answer=ChatAnswer(envelope, model.token_bytes, plan.choices),
        )

    async def _prepare_completion(self, body: bytes, request_id: str) -> Prepared:
        request = decode_request(body, CompletionRequest)
        plan = plan_completion(request)
        given = prompts_of(request)
        if len(given) * plan.choices > MAX_CHOICES:
            raise BadRequest(f"Prompts times 'n' is {len(given) * plan.choices}; at most {MAX_CHOICES}.", "n")
        model = await self._models.get(plan.model)
        prompts = [await self._prompt_tokens(model, each) for each in given]
        texts = [each if isinstance(each, str) else model.decode(each) for each in given] if request.echo else []
        echoes = texts or [""] * len(given)
        envelope = self._envelope(plan, model, f"cmpl-{request_id}")
        return Prepared(
            plan=plan,
            model=model,
            prompts=[prompt for prompt in prompts for _ in range(plan.choices)],
            max_new_tokens=self._room(plan, model, prompts),
            answer=CompletionAnswer(
                envelope, model.token_bytes, [echo for echo in echoes for _ in range(plan.choices)]
            ),
        )

    async def _prompt_tokens(self, model: TextModel, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            tokens = await model.encode_completion(prompt)
        else:
            tokens = prompt
            vocabulary = model.manifest.config.vocab_size
            if any(not 0 <= token < vocabulary for token in tokens):
                raise BadRequest(f"'prompt' has a token outside the vocabulary of {vocabulary}.", "prompt")
        bos = model.manifest.bos_token_id
        if not tokens and bos is not None:
            return [bos]
        return tokens

    def _room(self, plan: Plan, model: TextModel, prompts: list[list[int]]) -> int:
        """How many tokens may be generated. Raises `ContextExceeded`, and `BadRequest` for what the model rules out."""
        config = model.manifest.config
        longest = max(len(prompt) for prompt in prompts)
        if not all(prompts):
            raise BadRequest("The prompt has no tokens.", "prompt")
        if any(token >= config.vocab_size for token in plan.sampling.logit_bias):
            raise BadRequest(f"'logit_bias' has a token outside the vocabulary of {config.vocab_size}.", "logit_bias")
        room = config.context_length - longest
        wanted = plan.max_new_tokens
        if room < (wanted or 1):
            asked = f" and {wanted} new ones were asked for" if wanted else ""
            raise ContextExceeded(
                f"This model's context has {config.context_length} tokens, but the prompt has {longest}{asked}. "
                "Shorten the prompt or the answer."
            )
        return wanted or min(room, self._limits.default_max_new_tokens)

    def _envelope(self, plan: Plan, model: TextModel, answer_id: str) -> Envelope:
        return Envelope(
            id=answer_id,
            created=int(self._clock.unix_s()),
            model=plan.model,
            fingerprint=f"fp_{model.digest[:10]}",
            logprobs=plan.top_logprobs is not None,
            usage_in_stream=plan.usage_in_stream,
            tier=msgspec.UNSET if plan.tier is None else self._source.tier(plan.tier),
        )

    def refused(self, error: BaseException, request_id: str) -> Problem:
        """The reply to an error, counted and, when it is our fault, logged."""
        problem = problem_of(error, request_id)
        self.metrics.refusals.labels(problem.body.code or str(problem.status)).inc()
        if problem.status >= 500 and problem.body.code != OVERLOADED:
            hidden = problem.body.code == "internal"
            _LOG.warning("request %s failed: %s", request_id, error, exc_info=error if hidden else None)
        return problem


class _Endpoint:
    """Wraps a handler: request id, error replies, and the count of requests by route and status."""

    def __init__(self, gateway: _Gateway, handler: ASGIApp) -> None:
        self._gateway = gateway
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = f"{self._gateway.entropy() & 0xFFFF_FFFF_FFFF_FFFF:016x}"
        scope.setdefault("state", {})["request_id"] = request_id
        status = 499  # what proxies log for a client that went away before an answer

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._handler(scope, receive, send_noted)
        except ClientGone:
            self._gateway.metrics.disconnects.inc()
        except Exception as error:
            await send_problem(send_noted, self._gateway.refused(error, request_id))
        finally:
            self._gateway.metrics.requests.labels(scope["route"].path, str(status)).inc()


async def _http_error(request: Request, error: Exception) -> Response:
    """No such path (404) or method (405), in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}."
    problem = http_problem(error.status_code, message)
    headers = dict(error.headers or {}) | {"content-type": "application/json"}
    return Response(problem.encoded(), status_code=error.status_code, headers=headers)
