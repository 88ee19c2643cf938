"""What trust costs: a two-device chain with everything on, against the same with checks off.

    python benchmarks/cost_of_trust.py [--rounds 7] [--tokens 96]

Contenders, all with the default model at 8 bits, two device processes that share it, one stream through the HTTP API:

- trusted: `fallow up` as it comes: TLS and credentials on the bus, passports on links, grants counted on every frame,
  signed orders, a lease, numeric containment, canary and re-hash, the worker in its sandbox;
- open: the same with `trust.insecure_development`: none of it;
- sealed relay: as trusted, with every frame between devices over the bus, sealed (`links.relay = "only"`).

Method: as `stack.py`: all services run throughout; a round runs each contender once in an order drawn from a seed; a
ratio is the median of the rounds' ratios. Aim: trusted at least 0.97 of open.

Results: a table, and JSON in `benchmarks/results/cost_of_trust.json`.
"""

import argparse
import json
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table
from stack import HALVES, Stack, measure

from fallow.gateway.keys import new_key
from fallow.models.default import ensure_default_model
from fallow.models.store import Store
from fallow.processes.local_service import LocalService

RESULTS = Path(__file__).parent / "results" / "cost_of_trust.json"
AIM = 0.97
CONTENDERS = {
    "open": '[trust]\ninsecure_development = true\n[links]\nrelay = "never"\n',
    "trusted": '[links]\nrelay = "never"\n',
    "sealed relay": '[links]\nrelay = "only"\n',
}
NODES = ["--nodes", "2", "--memory", "1GiB", "--standbys", "0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    pairs = [new_key() for _ in range((options.rounds + 1) * len(CONTENDERS))]
    keys = "\n".join(f'[[gateway.keys]]\nid = "bench-{n}"\nsha256 = "{digest}"' for n, (_, digest) in enumerate(pairs))
    secrets = [secret for secret, _ in pairs]
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as folder, ExitStack() as services:
        root = Path(folder)
        store = Store(root / "store")
        manifest = ensure_default_model(store)
        runs = {}
        for name, settings in CONTENDERS.items():
            place = root / name.replace(" ", "-")
            environment = {"FALLOW_NODE_THREADS": "1"}
            service = services.enter_context(
                LocalService(place, NODES, store=store.root, settings=settings + HALVES + keys, environment=environment)
            )
            service.wait_until_servable()
            stack = Stack(service, secrets, manifest.name)
            runs[name] = lambda stack=stack: stack.run(1, options.tokens)
        figures = measure(runs, options.rounds)
    report(figures)


def report(figures: dict[str, list[float]]) -> None:
    """Print the table and write the JSON."""
    table = Table("contender", "tokens/s", "of open", "aim", box=None, pad_edge=False, header_style="bold")
    ratios = {}
    for name, speeds in figures.items():
        pairs = zip(speeds, figures["open"], strict=True)
        ratios[name] = statistics.median(mine / open_ for mine, open_ in pairs)
        aim = f">= {AIM}" if name == "trusted" else ""
        table.add_row(name, f"{statistics.median(speeds):.1f}", f"{ratios[name]:.3f}", aim)
    Console().print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"tokens_per_s": figures, "ratio_to_open": ratios, "aim": AIM}, indent=1))


if __name__ == "__main__":
    main()
