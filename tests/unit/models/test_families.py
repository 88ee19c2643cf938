"""Every family: the reference agrees with transformers, and what the store holds agrees with the reference."""

import msgspec
import numpy as np
import pytest
from checkpoints import FAMILIES, FIXTURES, reference, relative_error

from fallow.domain.errors import BlobUnavailable, ModelError
from fallow.domain.model import Family, Llama3RopeScaling, Quantisation
from fallow.models.huggingface_reader import HuggingFaceSource
from fallow.models.importer import import_model, open_source
from fallow.models.reference import ReferenceModel, SourceWeights, StoredWeights
from fallow.models.store import Store
from fallow.models.tokenizer import load_tokenizer


def source_model(family: str) -> ReferenceModel:
    return ReferenceModel(SourceWeights(open_source(FIXTURES / family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_agrees_with_transformers(family):
    expected = reference(family)
    assert relative_error(source_model(family).logits(expected["tokens"]), expected["logits"]) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_continuations_agree_token_by_token(family):
    expected, model = reference(family), source_model(family)
    token = int(model.logits(expected["tokens"])[-1].argmax())
    greedy = [token]
    while len(greedy) < 16:
        token = int(model.logits([token])[-1].argmax())
        greedy.append(token)
    assert greedy == expected["greedy"].tolist()


def test_chunks_give_what_one_call_gives():
    expected, model = reference("qwen3"), source_model("qwen3")
    pieces = [model.logits(piece) for piece in np.split(expected["tokens"], [1, 2, 17, 40])]
    assert model.position == 48
    assert relative_error(np.concatenate(pieces), expected["logits"]) < 2e-5
    model.reset()
    assert relative_error(model.logits(expected["tokens"][:5]), expected["logits"][:5]) < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_32_bits_in_the_store_change_nothing(tmp_path, family):
    store, tokens = Store(tmp_path), reference(family)["tokens"]
    report = import_model(FIXTURES / family, store, Quantisation.F32)
    assert report.loss == {}
    stored = ReferenceModel(StoredWeights(store.manifest(report.digest), store)).logits(tokens)
    np.testing.assert_array_equal(stored, source_model(family).logits(tokens))


@pytest.mark.parametrize(("quantisation", "loss_min", "loss_max"), [("q8", 1e-3, 8e-3), ("q4", 3e-2, 9e-2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantisation_costs_what_it_reports(tmp_path, family, quantisation, loss_min, loss_max):
    store, tokens = Store(tmp_path), reference(family)["tokens"]
    report = import_model(FIXTURES / family, store, Quantisation(quantisation))
    config = report.manifest.config
    kinds = {"embedding", "qkv", "attention_out", "gate_up", "down"} | (set() if config.tied_head else {"head"})
    assert report.loss.keys() == kinds
    for kind in ("qkv", "attention_out", "gate_up", "down"):
        assert loss_min < report.loss[kind] < loss_max
    assert report.loss["embedding"] < 8e-3
    weights, original = StoredWeights(report.manifest, store), SourceWeights(HuggingFaceSource(FIXTURES / family))
    for name in ("qkv", "attention_out", "gate_up", "down"):
        stored = np.concatenate([weights.layer(index)[name].ravel() for index in range(config.layer_count)])
        exact = np.concatenate([original.layer(index)[name].ravel() for index in range(config.layer_count)])
        assert np.linalg.norm(stored - exact) / np.linalg.norm(exact) == pytest.approx(report.loss[name], rel=1e-3)
    stored_logits = ReferenceModel(weights).logits(tokens)
    assert relative_error(stored_logits, reference(family)["logits"]) < (0.1 if quantisation == "q8" else 1.0)


def test_the_manifest_tells_what_the_folder_says(tmp_path):
    store, steps = Store(tmp_path), []
    report = import_model(FIXTURES / "llama_rope", store, progress=lambda *step: steps.append(step))
    manifest = report.manifest
    assert manifest.quantisation is Quantisation.Q8
    assert (manifest.name, manifest.licence) == ("llama_rope", "apache-2.0")
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (0, (1,))
    assert manifest.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert manifest.chat_template.startswith("{% for m in messages %}")
    assert manifest.source.startswith("llama_rope sha256:")
    assert manifest.config.family is Family.LLAMA
    assert manifest.config.rope_scaling == Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=32
    )
    tokenizer = load_tokenizer(store.blob_path(manifest.tokenizer.digest))
    text = "the singing <s> the thing\n"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert [done for done, _, _ in steps] == list(range(1, 8))
    assert steps[-1] == (7, 7, "manifest")
    assert [what for _, _, what in steps[:3]] == ["embedding", "layer 1 of 4", "layer 2 of 4"]


def test_importing_twice_gives_the_same_model(tmp_path):
    first = import_model(FIXTURES / "qwen2", Store(tmp_path / "a"), Quantisation.Q4, "mine")
    second = import_model(FIXTURES / "qwen2", Store(tmp_path / "b"), Quantisation.Q4, "mine")
    assert first.digest == second.digest
    assert Store(tmp_path / "a").by_name("mine")[0] == first.digest


def test_the_reference_refuses_what_it_cannot_do(tmp_path):
    model = source_model("llama")
    for tokens in ([288], [-1], []):
        with pytest.raises(ModelError, match="token ids below 288"):
            model.logits(tokens)
    with pytest.raises(ModelError, match="context of 256 tokens is full"):
        model.logits([5] * 257)
    store = Store(tmp_path)
    manifest = import_model(FIXTURES / "llama", store).manifest
    absent = msgspec.structs.replace(manifest, embedding=msgspec.structs.replace(manifest.head, digest="0" * 64))
    with pytest.raises(BlobUnavailable, match="is not in the store"):
        ReferenceModel(StoredWeights(absent, store))
