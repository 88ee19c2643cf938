"""A tiny model for the API's tests: a byte-level BPE trained on a few lines, a ChatML template, and a manifest."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from fallow.domain.ids import Digest, ModelName
from fallow.domain.model import BlobRef, Family, Manifest, ModelConfig, Quantisation
from fallow.gateway.api import ApiLimits, create_app
from fallow.gateway.keys import ApiKey
from fallow.gateway.memory import MemoryTokenSource, Predictor, hash_predictor
from fallow.gateway.metrics import GatewayMetrics
from fallow.gateway.server import HttpServer, ServerLimits, serve
from fallow.policy.admission import AdmissionRules
from fallow.system_clock import SystemClock

VOCABULARY = 400
CONTEXT = 256
MODEL = "tiny-chat"
SPECIAL = ("<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The fleet answers while a device dies.",
    "Idle devices answer questions.",
    "Grüße, 日本 und 🦊 🦊.",
    "a b c d e",
]

T = TypeVar("T")


@cache
def tokenizer() -> Tokenizer:
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(CORPUS, trainer)
    return built


def tokenizer_json() -> bytes:
    return bytes(tokenizer().to_str(), "utf-8")


def manifest(name: str = MODEL, chat_template: str | None = CHATML) -> Manifest:
    def blob(mark: int) -> BlobRef:
        digest = Digest(f"{mark:064x}")
        return BlobRef(digest=digest, size_bytes=1, chunk_digests=(digest,))

    config = ModelConfig(
        family=Family.LLAMA,
        layer_count=1,
        hidden_size=32,
        head_count=1,
        kv_head_count=1,
        head_dim=32,
        intermediate_size=32,
        vocab_size=VOCABULARY,
        context_length=CONTEXT,
        norm_epsilon=1e-5,
        rope_theta=10_000.0,
    )
    return Manifest(
        format=1,
        name=ModelName(name),
        config=config,
        quantisation=Quantisation.F32,
        embedding=blob(1),
        layers=(blob(2),),
        head=blob(3),
        tokenizer=blob(4),
        chat_template=chat_template,
        bos_token_id=0,
        eos_token_ids=(1,),
        special_tokens={"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]},
    )


def saying(text: str, after: str = "assistant\n") -> Predictor:
    """A predictor that says `text` after whatever prompt ends with `after`, then ends its turn."""
    script = [*tokenizer().encode(text).ids, 1]
    marker = tokenizer().encode(after).ids
    flat = hash_predictor(VOCABULARY)

    def predict(tokens: Sequence[int]) -> Any:
        start = next(i for i in range(len(tokens), 0, -1) if list(tokens[i - len(marker) : i]) == marker)
        logits = flat(tokens)
        logits[script[min(len(tokens) - start, len(script) - 1)]] = 30.0
        return logits

    return predict


async def read_tokenizer(_: Manifest) -> bytes:
    return tokenizer_json()


class World(msgspec.Struct):
    source: MemoryTokenSource
    metrics: GatewayMetrics
    app: Starlette
    server: HttpServer

    @property
    def base_url(self) -> str:
        return f"{self.server.url}/v1"


def app_of(
    predictor: Predictor | None = None,
    *,
    keys: Sequence[ApiKey] = (),
    limits: ApiLimits | None = None,
    tokenizer_file: Callable[[Manifest], Awaitable[bytes]] = read_tokenizer,
    manifests: Sequence[Manifest] | None = None,
    metrics: GatewayMetrics | None = None,
    admission: AdmissionRules | None = None,
    **source_options: Any,
) -> tuple[MemoryTokenSource, Starlette]:
    """The app in front of the in-memory token source."""
    clock = SystemClock()
    served = [manifest()] if manifests is None else manifests
    source = MemoryTokenSource(served, predictor or hash_predictor(VOCABULARY), clock, **source_options)
    return source, create_app(source, tokenizer_file, clock, keys, limits, metrics, admission=admission)


@asynccontextmanager
async def world(
    predictor: Predictor | None = None, *, server_limits: ServerLimits | None = None, **options: Any
) -> AsyncIterator[World]:
    """A real server on a free port of the loopback."""
    metrics = GatewayMetrics()
    source, app = app_of(predictor, metrics=metrics, **options)
    server = await serve(app, "127.0.0.1", 0, server_limits or ServerLimits(shutdown_s=1))
    try:
        yield World(source, metrics, app, server)
    finally:
        await server.close()


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for something that happens on its own; fails when it does not."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)
