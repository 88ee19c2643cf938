"""Hugging Face folders: what real ones vary in is understood; what is hostile or not served is refused by name."""

import json
import shutil

import numpy as np
import pytest
from checkpoints import FIXTURES, reference, relative_error
from safetensors.numpy import save_file

from fallow.domain.errors import ModelError
from fallow.domain.model import Quantisation
from fallow.models.huggingface_reader import HuggingFaceSource
from fallow.models.importer import import_model, open_source
from fallow.models.reference import ReferenceModel, SourceWeights
from fallow.models.store import Store


@pytest.fixture
def folder(tmp_path):
    """A copy of a fixture that a test may spoil."""

    def copy(family):
        return shutil.copytree(FIXTURES / family, tmp_path / family)

    return copy


def edit_json(path, **changes):
    content = json.loads(path.read_text()) if path.is_file() else {}
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def weights(folder):
    """The checkpoint's tensors as float32, read with Fallow's reader, under their own names."""
    source = HuggingFaceSource(folder)
    return {name: source._map(path)[entry.start : entry.end] for name, (path, entry) in source._entries.items()}, source


def rewrite(folder, edit):
    """Store a checkpoint again in one float32 file, after `edit(tensors)`."""
    raw, source = weights(folder)
    half = source._entries["model.norm.weight"][1].dtype == "F16"
    tensors = {}
    for name, values in raw.items():
        wide = (
            values.view("<f2").astype(np.float32) if half else (values.view("<u2").astype("u4") << 16).view(np.float32)
        )
        tensors[name] = wide.reshape(source._entries[name][1].shape)
    edit(tensors)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


def refused(folder, complaint, quantisation=Quantisation.Q8):
    with pytest.raises(ModelError, match=complaint):
        import_model(folder, Store(folder.parent / "store"), quantisation)


# --- what real folders vary in ------------------------------------------------------------------


def test_older_configs_say_rope_in_another_way(folder):
    path = folder("llama_rope")
    rope = json.loads((path / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    edit_json(path / "config.json", rope_parameters=..., rope_theta=theta, rope_scaling=rope)
    assert HuggingFaceSource(path).config == HuggingFaceSource(FIXTURES / "llama_rope").config


def test_what_a_config_leaves_out_has_its_familys_default(folder):
    path = folder("llama")
    edit_json(
        path / "config.json", head_dim=..., tie_word_embeddings=..., rope_parameters=..., num_key_value_heads=None
    )
    config = HuggingFaceSource(path).config
    assert (config.head_dim, config.tied_head, config.rope_theta, config.kv_head_count) == (16, False, 10000.0, 4)


@pytest.mark.parametrize(
    ("family", "changes", "length"),
    [
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": 4096}, 256),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, 256),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, 64),
    ],
)
def test_a_sliding_window_in_use_limits_the_context(folder, family, changes, length):
    path = folder(family)
    edit_json(path / "config.json", **changes)
    source = HuggingFaceSource(path)
    assert source.config.context_length == length
    assert bool(source.details().notes) == (length == 64)


def test_32_bit_checkpoints_and_shards_are_read(folder):
    path = folder("mistral")
    assert (path / "model.safetensors.index.json").is_file()
    rewrite(
        path, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    )
    expected = reference("mistral")
    logits = ReferenceModel(SourceWeights(open_source(path))).logits(expected["tokens"])
    assert relative_error(logits, expected["logits"]) < 1e-4


def test_a_saved_copy_of_a_tied_head_is_ignored(folder):
    path = folder("qwen2")
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": np.zeros((288, 64), np.float32)}))
    assert HuggingFaceSource(path).config.tied_head
    expected = reference("qwen2")
    logits = ReferenceModel(SourceWeights(open_source(path))).logits(expected["tokens"])
    assert relative_error(logits, expected["logits"]) < 1e-4


def test_templates_tokens_and_licence_are_found_where_they_are(folder):
    path = folder("llama")
    (path / "chat_template.jinja").unlink()
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    edit_json(path / "tokenizer_config.json", chat_template=templates, eos_token={"content": "</s>"})
    edit_json(path / "generation_config.json", eos_token_id=[5, 1, 7])
    (path / "README.md").unlink()
    (path / "LICENSE").write_text("\n   Apache License  \nVersion 2.0\n")
    details = HuggingFaceSource(path).details()
    assert details.chat_template == "yes"
    assert details.eos_token_ids == (5, 1, 7)
    assert details.special_tokens["eos_token"] == "</s>"
    assert details.licence == "Apache License"


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd.safetensors", "a/b.safetensors", "..\\x.safetensors", 7]
)
def test_shards_outside_the_folder_are_refused(folder, name):
    path = folder("mistral")
    edit_json(path / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    refused(path, "expected names of safetensors files in the folder")


def test_a_pickle_is_refused_by_name(folder):
    path = folder("llama")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    refused(path, "'pytorch_model.bin' is a Python pickle, which can run code")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not served; expected llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type 'None' is not served"),
        ({"model_type": ["llama"]}, "is not served"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias is not served"),
        ({"mlp_bias": True}, "mlp_bias is not served"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised checkpoints"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor: expected a number"),
        ({"rope_parameters": [1]}, "rope_scaling: expected an object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial rotary"),
        ({"hidden_size": "64"}, "hidden_size: expected a number"),
        ({"hidden_size": True}, "hidden_size: expected a number"),
        ({"num_hidden_layers": 10**9}, "layer_count: expected 1 to 1024"),
        ({"num_attention_heads": 0}, "head_count: expected 1"),
        ({"num_attention_heads": 8}, "expected shape"),
        ({"num_hidden_layers": 3}, "'model.layers.3.* is not part of a llama model"),
        ({"num_hidden_layers": 5}, "expected a tensor 'model.layers.4"),
        ({"vocab_size": 300}, r"expected shape \[300, 64\], got \[288, 64\]"),
    ],
)
def test_configs_that_cannot_be_served_are_refused_by_name(folder, changes, complaint):
    path = folder("llama")
    edit_json(path / "config.json", **changes)
    refused(path, complaint)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("config.json", None, "expected a file config.json"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b"[" * 200_000, "not valid JSON"),
        ("config.json", b"[1]", "expected a JSON object"),
        ("tokenizer.json", None, "expected a file tokenizer.json"),
        ("tokenizer.json", b"{}", "not a valid tokenizers JSON file"),
        ("tokenizer.json", b"\xff", "not a valid tokenizers JSON file"),
        ("model.safetensors", None, "expected model.safetensors or model.safetensors.index.json"),
        ("model.safetensors", b"\xff" * 100, "its header claims"),
        ("model.safetensors", b"short", "got 5 bytes"),
    ],
)
def test_broken_files_are_refused_by_name(folder, name, content, complaint):
    path = folder("llama")
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    refused(path, complaint)


def put(name, values):
    return lambda tensors: tensors.update({name: values})


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (put("model.layers.1.mlp.up_proj.weight", np.full((32, 64), np.nan, np.float32)), "up_proj.*finite"),
        (put("model.norm.weight", np.full(64, -np.inf, np.float32)), "'model.norm.weight'.*finite"),
        (put("model.layers.1.mlp.up_proj.weight", np.ones((64, 32), np.float32)), r"expected shape \[32, 64\]"),
        (put("model.layers.1.mlp.up_proj.weight", np.ones((32, 64), np.int8)), "stored as I8; expected one of F32"),
        (put("model.layers.1.self_attn.o_proj.bias", np.ones(64, np.float32)), "o_proj.bias' is not part of a llama"),
        (lambda tensors: tensors.pop("lm_head.weight"), "expected a tensor 'lm_head.weight'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, edit, complaint):
    path = folder("llama")
    rewrite(path, edit)
    refused(path, complaint)


def test_a_tensor_in_two_shards_is_refused(folder):
    path = folder("mistral")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shutil.copy(path / "model-00001-of-00002.safetensors", path / "copy.safetensors")
    edit_json(path / "model.safetensors.index.json", weight_map=index["weight_map"] | {"x": "copy.safetensors"})
    refused(path, "is in both copy.safetensors and model-00001-of-00002.safetensors")


def test_sizes_that_do_not_divide_by_32_need_32_bits(folder):
    path = folder("llama")

    def narrower(tensors):
        for name in list(tensors):
            if "gate_proj" in name or "up_proj" in name:
                tensors[name] = tensors[name][:24].copy()
            elif "down_proj" in name:
                tensors[name] = np.ascontiguousarray(tensors[name][:, :24])

    rewrite(path, narrower)
    edit_json(path / "config.json", intermediate_size=24)
    refused(path, "q8 needs input sizes that divide by 32, but intermediate_size is 24; import it with f32")
    refused(path, "q4 needs", Quantisation.Q4)
    assert import_model(path, Store(path.parent / "store"), Quantisation.F32).manifest.config.intermediate_size == 24


def test_a_path_that_is_not_there_and_a_bad_name_are_refused(tmp_path):
    with pytest.raises(ModelError, match="there is no file or folder 'nowhere'"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"model name '\.\./x'"):
        import_model(FIXTURES / "llama", Store(tmp_path), name="../x")
    assert not list((tmp_path / "blobs").iterdir())
