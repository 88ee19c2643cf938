"""A Hugging Face folder as a `WeightSource`: config.json, safetensors (single or sharded), tokenizer.json and company.

Nothing is executed and no pickle is opened: a folder with only `.bin` files is refused. File names that the shard index
gives must be plain names in the folder. What a config asks for and the engine does not do (other rope scalings,
activations, output biases) is refused by name, because leaving it out would change the model silently.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from fallow.domain.errors import ModelError
from fallow.domain.model import Family, Llama3RopeScaling, ModelConfig
from fallow.models.manifest import check_config
from fallow.models.safetensors_header import TensorEntry, read_header
from fallow.models.source import (
    SourceDetails,
    SourceTensor,
    check_shape,
    layer_roles,
    stored_bytes,
    tensor_from_bytes,
    text_or_none,
)
from fallow.models.tokenizer import MAX_TOKENIZER_BYTES, load_tokenizer

MAX_CHECKPOINT_HEADER_BYTES = 32 << 20
MAX_JSON_BYTES = 32 << 20
MAX_TEXT_BYTES = 1 << 20
MAX_SHARDS = 4096

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
MODEL_TYPES = {
    "llama": Family.LLAMA, "mistral": Family.MISTRAL, "qwen2": Family.QWEN2, "qwen3": Family.QWEN3,
}  # fmt: skip
DTYPES = {
    "F32": GGMLQuantizationType.F32, "F16": GGMLQuantizationType.F16, "BF16": GGMLQuantizationType.BF16,
}  # fmt: skip

_MODEL_NAMES = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight", "q": "self_attn.q_proj.weight", "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight", "q_bias": "self_attn.q_proj.bias", "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias", "q_norm": "self_attn.q_norm.weight", "k_norm": "self_attn.k_norm.weight",
    "attention_out": "self_attn.o_proj.weight", "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight", "up": "mlp.up_proj.weight", "down": "mlp.down_proj.weight",
}  # fmt: skip
_DERIVED = "rotary_emb.inv_freq"
"""Old checkpoints store these buffers; they follow from the config."""


class HuggingFaceSource:
    """An open folder. Raises `ModelError` on construction for models that are not served."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._notes: list[str] = []
        self._raw_config = _read_json(folder / "config.json")
        self._config = _model_config(self._raw_config, self._notes)
        check_config(self._config)
        self._files = _weight_files(folder)
        self._entries = self._read_headers()
        self._maps: dict[Path, NDArray[np.uint8]] = {}
        self._check_names()

    @property
    def config(self) -> ModelConfig:
        return self._config

    def tensor(self, role: str, layer: int | None = None) -> SourceTensor:
        name = _MODEL_NAMES[role] if layer is None else f"model.layers.{layer}.{_LAYER_NAMES[role]}"
        found = self._entries.get(name)
        if found is None:
            raise ModelError(f"{self._folder.name}: expected a tensor {name!r}, got none")
        path, entry = found
        kind = DTYPES.get(entry.dtype)
        if kind is None:
            raise ModelError(f"tensor {name!r} is stored as {entry.dtype}; expected one of {', '.join(DTYPES)}")
        stored_bytes(name, kind, entry.shape)
        tensor = tensor_from_bytes(name, kind, entry.shape, self._map(path)[entry.start : entry.end])
        return check_shape(self._config, role, tensor)

    def details(self) -> SourceDetails:
        tokenizer_json = _read_tokenizer(self._folder)
        settings = _read_json(self._folder / "tokenizer_config.json", optional=True)
        generation = _read_json(self._folder / "generation_config.json", optional=True)
        special = _special_tokens(settings)
        eos = [*_ids(generation.get("eos_token_id")), *_ids(self._raw_config.get("eos_token_id"))]
        eos += _ids(load_tokenizer(tokenizer_json).token_to_id(special.get("eos_token", "")))
        bos = [*_ids(self._raw_config.get("bos_token_id")), *_ids(generation.get("bos_token_id"))]
        return SourceDetails(
            name=self._folder.resolve().name,
            tokenizer_json=tokenizer_json,
            chat_template=_chat_template(self._folder, settings),
            bos_token_id=bos[0] if bos else None,
            eos_token_ids=tuple(dict.fromkeys(eos)),
            special_tokens=special,
            licence=_licence(self._folder),
            source=f"{self._folder.resolve().name} sha256:{self._digest()}",
            notes=tuple(self._notes),
        )

    def _read_headers(self) -> dict[str, tuple[Path, TensorEntry]]:
        entries: dict[str, tuple[Path, TensorEntry]] = {}
        for path in self._files:
            for name, entry in read_header(path, MAX_CHECKPOINT_HEADER_BYTES).items():
                if name in entries:
                    raise ModelError(f"tensor {name[:120]!r} is in both {entries[name][0].name} and {path.name}")
                entries[name] = (path, entry)
        return entries

    def _map(self, path: Path) -> NDArray[np.uint8]:
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype=np.uint8, mode="r")
        return self._maps[path]

    def _check_names(self) -> None:
        roles = layer_roles(self._config)
        layers = range(self._config.layer_count)
        known = set(_MODEL_NAMES.values())
        known |= {f"model.layers.{layer}.{_LAYER_NAMES[role]}" for layer in layers for role in roles}
        for name in self._entries:
            if name not in known and not name.endswith(_DERIVED):
                raise ModelError(
                    f"{self._folder.name}: tensor {name[:120]!r} is not part of a {self._config.family} model"
                )

    def _digest(self) -> str:
        """SHA-256 over the weight files, one after the other in the order of their names."""
        whole = hashlib.sha256()
        for path in self._files:
            with path.open("rb") as file:
                while piece := file.read(1 << 20):
                    whole.update(piece)
        return whole.hexdigest()


# --- configuration ------------------------------------------------------------------------------


def _model_config(raw: dict[str, Any], notes: list[str]) -> ModelConfig:
    kind = raw.get("model_type")
    family = MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise ModelError(f"config.json: model_type {str(kind)[:40]!r} is not served; expected {', '.join(MODEL_TYPES)}")
    _refuse_unserved(raw)
    heads, hidden = _number(raw, "num_attention_heads", int), _number(raw, "hidden_size", int)
    default_head_dim = 128 if family is Family.QWEN3 else hidden // max(heads, 1)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError("config.json: rope_scaling: expected an object")
    return ModelConfig(
        family=family,
        layer_count=_number(raw, "num_hidden_layers", int),
        hidden_size=hidden,
        head_count=heads,
        kv_head_count=_number(raw, "num_key_value_heads", int, heads if family is Family.LLAMA else None),
        head_dim=_number(raw, "head_dim", int, default_head_dim),
        intermediate_size=_number(raw, "intermediate_size", int),
        vocab_size=_number(raw, "vocab_size", int),
        context_length=_context_length(raw, notes),
        norm_epsilon=_number(raw, "rms_norm_eps", float, 1e-6),
        rope_theta=_number({**raw, **rope}, "rope_theta", float, 10000.0),
        rope_scaling=_rope_scaling(rope),
        qkv_bias=family is Family.QWEN2,
        qk_norm=family is Family.QWEN3,
        tied_head=raw.get("tie_word_embeddings") is True,
    )


def _refuse_unserved(raw: dict[str, Any]) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"config.json: hidden_act {str(raw['hidden_act'])[:40]!r} is not served; expected 'silu'")
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ModelError(f"config.json: {key} is not served")
    if raw.get("quantization_config"):
        raise ModelError("config.json: quantised checkpoints are not served; expected F32, F16 or BF16 weights")


def _rope_scaling(rope: dict[str, Any]) -> Llama3RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config.json: partial rotary embedding is not served")
    if kind == "default":
        return None
    if kind != "llama3":
        raise ModelError(f"config.json: rope scaling {str(kind)[:40]!r} is not served; expected 'default' or 'llama3'")
    return Llama3RopeScaling(
        factor=_number(rope, "factor", float),
        low_freq_factor=_number(rope, "low_freq_factor", float),
        high_freq_factor=_number(rope, "high_freq_factor", float),
        original_context_length=_number(rope, "original_max_position_embeddings", int),
    )


def _context_length(raw: dict[str, Any], notes: list[str]) -> int:
    """The trained length, or the sliding window when one is in use: below the window both attend to everything."""
    length: int = _number(raw, "max_position_embeddings", int)
    used = raw.get("use_sliding_window", raw.get("model_type") == "mistral")
    window = raw.get("sliding_window") if used else None
    if isinstance(window, int) and 0 < window < length:
        notes.append(f"context limited from {length} to its sliding window of {window} tokens")
        return window
    return length


def _number(raw: dict[str, Any], key: str, kind: type[Any], default: Any = None) -> Any:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float if kind is float else int):
        raise ModelError(f"config.json: {key}: expected a number, got {str(value)[:60]!r}")
    return kind(value)


# --- files --------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SHARD_INDEX).is_file():
        weight_map = _read_json(folder / SHARD_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{SHARD_INDEX}: expected a weight_map")
        names = sorted({_plain_name(name) for name in weight_map.values()})
        if len(names) > MAX_SHARDS:
            raise ModelError(f"{SHARD_INDEX}: expected at most {MAX_SHARDS} files, got {len(names)}")
        return [folder / name for name in names]
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    pickles = sorted(path.name for path in folder.glob("*.bin")) + sorted(path.name for path in folder.glob("*.pt*"))
    if pickles:
        raise ModelError(
            f"{folder.name}: {pickles[0]!r} is a Python pickle, which can run code when opened; "
            "convert the model to safetensors"
        )
    raise ModelError(f"{folder.name}: expected {SINGLE_FILE} or {SHARD_INDEX}")


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or not name.endswith(".safetensors") or name != Path(name).name or "\\" in name:
        raise ModelError(f"{SHARD_INDEX}: expected names of safetensors files in the folder, got {str(name)[:120]!r}")
    return name


def _read_bytes(path: Path, limit: int) -> bytes | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ModelError(f"{path.name}: expected at most {limit} bytes")
    return content


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    content = _read_bytes(path, MAX_JSON_BYTES)
    if content is None:
        if optional:
            return {}
        raise ModelError(f"{path.parent.name}: expected a file {path.name}")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name}: expected a JSON object")
    return value


def _read_tokenizer(folder: Path) -> bytes:
    content = _read_bytes(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
    if content is None:
        other = "; its tokenizer.model is not read" if (folder / "tokenizer.model").is_file() else ""
        raise ModelError(f"{folder.name}: expected a file tokenizer.json{other}")
    return load_tokenizer(content).to_str().encode("utf-8")


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    own_file = _read_bytes(folder / "chat_template.jinja", MAX_TEXT_BYTES)
    if own_file is not None:
        return own_file.decode("utf-8", "replace")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return text_or_none(template)


def _licence(folder: Path) -> str | None:
    """The identifier in the model card, else the first line of the licence file."""
    card = (_read_bytes(folder / "README.md", MAX_TEXT_BYTES) or b"").decode("utf-8", "replace")
    if card.startswith("---"):
        for line in card.split("---", 2)[1].splitlines():
            if line.startswith("license:"):
                return text_or_none(line.partition(":")[2].strip().strip("\"'"))
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE"):
        lines = (_read_bytes(folder / name, MAX_TEXT_BYTES) or b"").decode("utf-8", "replace").splitlines()
        first = next((line.strip() for line in lines if line.strip()), None)
        if first:
            return first[:200]
    return None


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]
