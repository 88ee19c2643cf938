"""What is fuzzed: every place where a stranger's bytes become values.

A target takes bytes and either returns or raises a `FallowError`; anything else is a finding. Where a signature guards
what is inside, the fuzzer holds the key, so that the inside is reached.
"""

import base64
import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from fallow.config import load
from fallow.coordinator import checks
from fallow.domain import fleet, frames
from fallow.domain.charter import FleetPolicy, Halt
from fallow.domain.credentials import Role
from fallow.domain.errors import FallowError, SealBroken
from fallow.domain.grants import Grant, Order
from fallow.domain.ids import Digest, ModelName, NodeId, SessionId
from fallow.domain.model import Span, StageSpec
from fallow.domain.sampling import Recipe
from fallow.fabric import sealing
from fallow.fabric.codec import FrameDecoder, encode
from fallow.fabric.local_handshake import Identity as LinkIdentity
from fallow.gateway.requests import decode_request, plan_chat, plan_completion, prompts_of, template_messages
from fallow.gateway.schema import ChatRequest, CompletionRequest
from fallow.models.gguf_file import open_gguf
from fallow.models.importer import import_model
from fallow.models.manifest import decode_manifest, encode_manifest
from fallow.models.safetensors_header import build_header, read_header
from fallow.models.store import Store
from fallow.simulator.scenario import load_scenario
from fallow.trust.council import tuf_format
from fallow.trust.council.ceremonies import Wanted, founding, publication_of, sign
from fallow.trust.council.figures import signed_figures, target_of
from fallow.trust.council.files import decode_proposal, encode_proposal, invitation_of, member_of_text, member_text
from fallow.trust.council.halts import decode_halts, halt_of_text, halt_text, seal_halt
from fallow.trust.council.proposals import Proposal, review
from fallow.trust.council.publication import decode_publication
from fallow.trust.council.publication import verify as verify_publication
from fallow.trust.envelope import Envelope, Kind, pre_authentication, seal, unseal
from fallow.trust.jwt import account_nkey, read_user
from fallow.trust.keys import identity_of
from fallow.trust.open_doors import OpenCellWords
from fallow.trust.passports import issue
from tests.fuzz import registrar_targets, rights_targets

KEY = identity_of(b"\x07" * 32)
NODE = KEY.node
SESSION = SessionId("ab" * 16)
MODEL = Digest("cd" * 32)
ADDRESS = frames.PeerAddress(NODE, ("127.0.0.1:7000",))
GRANT = Grant(
    id="12" * 16, cell="home", session=SESSION, gateway=NODE, node=NODE, model=MODEL, span=Span(0, 15),
    token_budget=512, issued_unix_s=1e9, expires_unix_s=1e9 + 600,
)  # fmt: skip


class Target(msgspec.Struct, frozen=True):
    """A parser, and valid inputs to begin with."""

    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


# --- passports --------------------------------------------------------------------------------------

SIGNED_MARK = b"signed:"


def passport(data: bytes) -> object:
    """A passport as a stranger shows it, or, after `SIGNED_MARK`, any claims under the account's own signature."""
    text = data.decode("utf-8", "replace")
    if data.startswith(SIGNED_MARK):
        start = f"{_PASSPORT.partition('.')[0]}.{_base64url(data[len(SIGNED_MARK) :])}"
        text = f"{start}.{_base64url(KEY.sign(start.encode()))}"
    return read_user(text, account_nkey(NODE))


def passport_seeds() -> Sequence[bytes]:
    """A good passport, and the claims of one."""
    claims = _PASSPORT.split(".")[1]
    return _PASSPORT.encode(), SIGNED_MARK + base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


_PASSPORT = issue(KEY, node=NODE, role=Role.NODE, tier=fleet.Tier.KEYED, cell="home", name="n", issued_unix_s=1e9)


# --- frames -----------------------------------------------------------------------------------------

FRAMES = (
    frames.Frame(frames.Hello(version_min=1, version_max=1, passport="x" * 40)),
    frames.Frame(frames.OpenStage(session=SESSION, epoch=1, model=MODEL, span=Span(0, 15), reserve_tokens=64)),
    frames.Frame(
        frames.Flow(session=SESSION, epoch=1, previous=None, next=ADDRESS, forward_from=0, results_from=0, rewind_to=3)
    ),
    frames.Frame(
        frames.Flow(
            session=SESSION, epoch=1, previous=NODE, next=None, forward_from=0, results_from=0,
            ahead=frames.Ahead(
                first=ADDRESS, first_session=SESSION, recipe=Recipe(temperature=0.7, seed=4), drawn_from=9, until=20,
                ends=(2,),
            ),
        )
    ),
    frames.Frame(
        frames.Rows(
            session=SESSION, epoch=1, position=0, count=2, phase=frames.Phase.PREFILL, logits_from=1, top_k=20
        ),
        bytes(8),
    ),
    frames.Frame(
        frames.Result(session=SESSION, epoch=1, position=0, count=1, logit_count=1, k=1), bytes(8)
    ),
    frames.Frame(frames.Fault(session=SESSION, epoch=1, code="x", message="y", suspect=NODE)),
    frames.Frame(frames.Chunk(digest=MODEL, index=0, found=True), b"content"),
)  # fmt: skip


def frame_codec(data: bytes) -> None:
    """Two pieces of one stream, cut in the middle."""
    decoder = FrameDecoder()
    for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
        decoder.feed(piece)
    decoder.finish()


# --- signed documents -------------------------------------------------------------------------------


def envelope_outside(data: bytes) -> None:
    unseal(Kind.GRANT, Grant, data)


def signed_body(data: bytes) -> None:
    """Well signed nonsense of every kind."""
    for kind, body in ((Kind.GRANT, Grant), (Kind.HALT, Halt), (Kind.ORDER, Order)):
        signature = KEY.sign(pre_authentication(kind, data))
        try:
            unseal(kind, body, msgspec.msgpack.encode(Envelope(kind, data, NODE, signature)))
        except FallowError:
            continue


# --- the council's documents --------------------------------------------------------------------------


def council_documents(data: bytes) -> None:
    """TUF metadata of every role, and what Fallow asks of each beyond TUF."""
    readers: tuple[Callable[[], object], ...] = (
        lambda: tuf_format.check_root(tuf_format.read(Root, data).signed),
        lambda: tuf_format.check_targets(tuf_format.read(Targets, data).signed),
        lambda: tuf_format.listed("models-a", tuf_format.read(Targets, data).signed.targets),
        lambda: [signed_figures(each) for each in tuf_format.read(Targets, data).signed.targets.values()],
        lambda: tuf_format.read(Snapshot, data),
        lambda: tuf_format.read(Timestamp, data),
        lambda: tuf_format.decode_policy(data),
        lambda: decode_halts(data, "n"),
    )
    for read in readers:
        with contextlib.suppress(FallowError):
            read()


def council_proposals(data: bytes) -> None:
    """What a member is asked to sign, and what anybody may post to the registrar."""
    with contextlib.suppress(FallowError):
        review(decode_proposal(data))
    with contextlib.suppress(FallowError):
        verify_publication(decode_publication(data), None, lambda _: None, 1e9)
    text = data.decode("utf-8", "replace")
    for read in (halt_of_text, invitation_of, lambda each: member_of_text(each, "")):
        with contextlib.suppress(FallowError):
            read(text)


def _proposal_seed() -> Proposal:
    wanted = Wanted(members={NODE: "a"}, threshold=1, online=NodeId("07" * 32), publishers={"models-a": NODE})
    signed, _ = sign(founding(wanted, 1e9), [KEY])
    return signed


def _document_seeds() -> tuple[bytes, ...]:
    proposed = _proposal_seed()
    halt = seal_halt(KEY, "n", 1, "w", 1.0)
    assert proposed.root is not None
    timestamp = Metadata(Timestamp(expires=tuf_format.utc(1e9))).to_bytes()
    snapshot = Metadata(Snapshot(expires=tuf_format.utc(1e9))).to_bytes()
    texts = (proposed.root, proposed.targets, proposed.policy, proposed.delegated["models-a"])
    entry = target_of(tuf_format.path_of("models-a", "f" * 64), _manifest_seed())
    models = Metadata(Targets(expires=tuf_format.utc(1e9), targets={entry.path: entry})).to_bytes()
    return (*(each.encode() for each in texts), models, timestamp, snapshot, msgspec.msgpack.encode([halt]))


def _proposal_seeds() -> tuple[bytes, ...]:
    proposed = _proposal_seed()
    texts = (halt_text(seal_halt(KEY, "n", 1, "w", 1.0)), member_text(KEY, "a", ""))
    publication = msgspec.msgpack.encode(publication_of(proposed))
    return encode_proposal(proposed), publication, *(each.encode() for each in texts)


# --- models -----------------------------------------------------------------------------------------


def manifest(data: bytes) -> None:
    decode_manifest(data)


def _file(data: bytes, read: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        read(path)


def safetensors(data: bytes) -> None:
    _file(data, lambda path: read_header(path, 1 << 20))


def gguf(data: bytes) -> None:
    _file(data, open_gguf)


# --- requests, bus messages, settings ---------------------------------------------------------------


def chat_body(data: bytes) -> None:
    request = decode_request(data, ChatRequest)
    plan_chat(request)
    template_messages(request.messages)


def completion_body(data: bytes) -> None:
    request = decode_request(data, CompletionRequest)
    plan_completion(request)
    prompts_of(request)


BEAT = fleet.Heartbeat(
    node=NODE, name="desk", sequence=1, boot="b", address=ADDRESS, memory_bytes=1 << 30, kv_budget_bytes=1 << 28,
    kv_free_bytes=1 << 27, hosted=(
        fleet.HostedStage(
            stage=StageSpec(model=MODEL, pieces=(Span(0, 3), Span(3, 6))), status=fleet.StageStatus.READY,
            speed=fleet.Speed(layer_s_1=1e-3, layer_s_4=2e-3, layer_s_8=3e-3),
        ),
    ), cached={MODEL: (Span(0, 6),)}, link_rtt_s={NODE: 0.01},
    outlook=fleet.Outlook(survival=(1.0, 0.9, 0.8, 0.5, 0.2), expected_s=5e4),
)  # fmt: skip
KEPT = fleet.Hop(address=ADDRESS, span=Span(0, 3))
ROUTE = fleet.RouteRequest(
    model=MODEL, session=SESSION, reserve_tokens=64, exclude=(NODE,), keep=(KEPT,),
    accused=(fleet.Accusation(node=NODE, others=(NODE,)),),
)  # fmt: skip
REPORT = fleet.GatewayReport(gateway=NODE, url="http://127.0.0.1", sessions=1, tokens_per_s=1.0, chains=((NODE,),))


def bus_messages(data: bytes) -> None:
    readers: tuple[Callable[[], object], ...] = (
        lambda: checks.heartbeat(f"fallow.home.node.{NODE}.heartbeat", data),
        lambda: checks.gateway_request(f"fallow.home.gateway.{NODE}.route", data),
        lambda: checks.gateway_report(f"fallow.home.gateway.{NODE}.report", data),
        lambda: checks.store_announced(f"fallow.home.gateway.{NODE}.store", data),
        lambda: checks.leaving(f"fallow.home.node.{NODE}.leaving", data),
        lambda: checks.cell_question(data, OpenCellWords().asked),
        lambda: checks.cell_digest("fallow.cells.home.digest", data, OpenCellWords().told),
        lambda: checks.files_found(data),
        lambda: checks.route_reply(data, ROUTE, 30),
    )
    for read in readers:
        try:
            read()
        except FallowError:
            continue


def settings(data: bytes) -> None:
    def read(path: Path) -> object:
        path = path.rename(path.with_name("fallow.toml"))
        return load({}, {}, path)

    _file(data, read)


def scenario(data: bytes) -> None:
    _file(data, load_scenario)


def _encoded(*values: object) -> tuple[bytes, ...]:
    return tuple(msgspec.json.encode(value) for value in values)


SMALL = Path(__file__).parents[1] / "fixtures" / "families" / "llama"
SCENARIOS = Path(__file__).parents[2] / "src" / "fallow" / "simulator" / "scenarios"
CHAT = {
    "model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "temperature": 0.5,
    "top_p": 0.9, "stop": ["a"], "logit_bias": {"3": 1.5}, "logprobs": True, "top_logprobs": 3, "n": 2, "seed": 4,
    "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 10,
}  # fmt: skip
COMPLETION = {"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 5, "echo": False, "logprobs": 2, "stop": "x"}
TOML = b"""cell = "home"
local_nodes = 2
[node]
memory_bytes = "2GiB"
available = ["mon-fri 18:00-08:00"]
[[gateway.keys]]
id = "a"
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
"""


def _gguf_seed() -> bytes:
    import gguf as library
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.gguf"
        writer = library.GGUFWriter(path, "llama")
        writer.add_uint32("llama.block_count", 1)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _manifest_seed() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return encode_manifest(import_model(SMALL, Store(Path(folder)), name=ModelName("seed")).manifest)


def _safetensors_seed() -> bytes:
    header = build_header([("a", "F32", (2, 2)), ("b", "U8", (4,))])
    return header + bytes(20)


DIALLER, LISTENER = (LinkIdentity.from_seed(bytes([number] * 32)) for number in (8, 9))


@functools.cache
def _relay_exchange() -> tuple[sealing.Dialler, sealing.Listener, sealing.Seals, bytes, bytes]:
    """One handshake, its last message, and the first record after it."""
    dialler = sealing.Dialler(DIALLER, LISTENER.node, "home")
    listener = sealing.Listener(LISTENER, "home", DIALLER.node, dialler.dial)
    confirm, near = dialler.answered(listener.answer)
    return dialler, listener, listener.confirmed(confirm), confirm, near.sealer.seal(bytes(9) + encode(FRAMES[0]))


def sealed_relay(data: bytes) -> None:
    """What a captured bus may send to either side of a handshake, and to a link; a dial with its sender's signature as
    well, since a device may be hostile."""
    dialler, listener, far, _, _ = _relay_exchange()
    body = data[: -sealing.SIGNATURE_BYTES]
    signed = body + DIALLER.sign(sealing._context("home") + body)
    for read in (dialler.answered, listener.confirmed, far.opener.open, sealing.parse_head):
        with contextlib.suppress(SealBroken):
            read(data)
    sealing.Listener(LISTENER, "home", DIALLER.node, data if data[-1:] == b"\0" else signed)


def _relay_seeds() -> tuple[bytes, ...]:
    dialler, listener, _, confirm, record = _relay_exchange()
    return dialler.dial, listener.answer, confirm, record


def targets() -> dict[str, Target]:
    """Every target by name."""
    signed: Sequence[msgspec.Struct] = (GRANT, Halt(network="n", epoch=1, why="w", issued_unix_s=1.0))
    order = fleet.PlaceStage(stage=BEAT.hosted[0].stage, manifest_bytes=10, sources=(ADDRESS,), epoch=3)
    return {
        "frame_codec": Target(frame_codec, tuple(encode(frame) for frame in FRAMES)),
        "passport": Target(passport, tuple(passport_seeds())),
        "envelope": Target(envelope_outside, tuple(seal(Kind.GRANT, each, KEY) for each in signed)),
        "signed_body": Target(signed_body, _encoded(*signed, order, FleetPolicy(epoch=1))),
        "council_documents": Target(council_documents, _document_seeds()),
        "council_proposals": Target(council_proposals, _proposal_seeds()),
        "manifest": Target(manifest, (_manifest_seed(),)),
        "safetensors": Target(safetensors, (_safetensors_seed(),)),
        "gguf": Target(gguf, (_gguf_seed(),)),
        "chat_body": Target(chat_body, (json.dumps(CHAT).encode(),)),
        "completion_body": Target(completion_body, (json.dumps(COMPLETION).encode(),)),
        "bus_messages": Target(bus_messages, _encoded(BEAT, ROUTE, REPORT, fleet.NodeLeaving(node=NodeId(NODE)))),
        "settings": Target(settings, (TOML,)),
        "sealed_relay": Target(sealed_relay, _relay_seeds()),
        **{name: Target(read, seeds) for name, (read, seeds) in registrar_targets.seeds().items()},
        **{name: Target(read, seeds) for name, (read, seeds) in rights_targets.seeds().items()},
        "scenario": Target(scenario, tuple(path.read_bytes() for path in sorted(SCENARIOS.glob("*.toml")))),
    }
