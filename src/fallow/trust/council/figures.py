"""The figures of a model that stand beside its manifest's digest in a publisher's list.

Rules
- They are worked out from the manifest, never given: the publisher's command writes them, the repository works them out
  again, and coordinators believe a store only where it announces the same.
- They stand in the `custom` field that TUF leaves to applications, and are signed with everything else. The manifest's
  length is the entry's own.
- A manifest that this Fallow cannot read is listed without figures, and no coordinator places it.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
from tuf.api.metadata import TargetFile

from fallow.domain.charter import ModelFigures
from fallow.domain.model import Manifest
from fallow.policy.figures import figures_of_manifest

FIGURES_FIELD = "x-fallow-figures"


def target_of(path: str, data: bytes) -> TargetFile:
    """The entry of a file; with figures, when it is a manifest that can be read."""
    target = TargetFile.from_data(path, data, ["sha256"])
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return target
    figures: dict[str, Any] = msgspec.to_builtins(figures_of_manifest(manifest, len(data)))
    del figures["manifest_bytes"]
    target.unrecognized_fields["custom"] = {FIGURES_FIELD: figures}
    return target


def signed_figures(target: TargetFile) -> ModelFigures | None:
    """The figures in a model's entry; `None` when it brings none that can be read."""
    custom = target.custom
    found = custom.get(FIGURES_FIELD) if isinstance(custom, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    try:
        return msgspec.convert(dict(found) | {"manifest_bytes": target.length}, ModelFigures)
    except (msgspec.ValidationError, RecursionError):
        return None
