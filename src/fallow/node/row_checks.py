"""Looks at hidden rows before they are computed: what a damaged predecessor sends goes no further.

Rules come with a model's manifest (`Manifest.activations`), one set for each cut point; a model without them has only
the check that every value is a number. Payloads of the wrong size are left to the engine, which refuses them by name.
The rules themselves are `policy/activations.py`'s. It takes some 20 µs a row.
"""

import numpy as np

from fallow.domain.ids import Digest
from fallow.domain.model import Manifest, Quantisation
from fallow.models.manifest import row_rules
from fallow.node.activation_log import Buffer
from fallow.policy.activations import RowRules

_EXPONENT_16 = 0x7C00


class RowChecks:
    """The rules of the models that this device hosts."""

    def __init__(self) -> None:
        self._manifests: dict[Digest, Manifest] = {}
        self._rules: dict[Digest, dict[int, RowRules]] = {}
        self.refused = 0

    def learn(self, model: Digest, manifest: Manifest) -> None:
        """Use a model's rules from now on. Raises `ModelError`."""
        self._rules[model] = row_rules(manifest)
        self._manifests[model] = manifest

    def forget(self, model: Digest) -> None:
        self._rules.pop(model, None)
        self._manifests.pop(model, None)

    def complaint(self, model: Digest, layer: int, payload: Buffer, count: int) -> str | None:
        """Why rows `[count, hidden]` that enter at this layer cannot be believed, or `None`. Tokens (layer 0) can."""
        manifest = self._manifests.get(model)
        if layer == 0 or manifest is None:
            return None
        dtype = np.dtype("<f4" if manifest.quantisation is Quantisation.F32 else "<f2")
        hidden = manifest.config.hidden_size
        if memoryview(payload).nbytes != count * hidden * dtype.itemsize:
            return None
        rows = np.frombuffer(payload, dtype).reshape(count, hidden)
        rules = self._rules[model].get(layer)
        if rules is not None:
            found = rules.complaint(rows)
        elif dtype.itemsize == 2:  # numpy has no fast path for float16: look at the exponents
            found = "a row is not finite" if int((rows.view("<u2") & _EXPONENT_16).max()) == _EXPONENT_16 else None
        else:
            found = None if np.isfinite(rows).all() else "a row is not finite"
        self.refused += found is not None
        return found
