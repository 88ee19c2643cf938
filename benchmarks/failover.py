"""How long an answer pauses when a device of its chain dies or hangs.

    python benchmarks/failover.py [--rounds 4] [--strike-at 120 ...]

Method: `fallow up` with three device processes, none of which does more than 0.7 of the model's work, every piece on
two of them. A round streams one greedy answer with a fresh API key and strikes one device of the chain, agent and
worker together, when `--strike-at` tokens of the answer are there (the prompt is about 105 more; with several numbers,
each gets its rounds): kill -9 in one round, SIGSTOP in the next, and every place of the chain in turn. The pause is the
longest time between two pieces of the stream; beside it stands the median time between pieces of the same stream. The
text must equal the undisturbed one. A struck device is back before the next round. Which layers were computed anew is
the gateway's word, out of its log: that does not depend on how busy the machine is, as the pause does.

Results: a table, and JSON in `benchmarks/results/failover.json`. Goals: 1 s for a kill, 3 s for a hang.
"""

import argparse
import itertools
import json
import os
import re
import signal
import statistics
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from fallow.gateway.keys import new_key
from fallow.models.default import ensure_default_model
from fallow.models.store import Store
from fallow.processes.local_service import LocalService, holders

RESULTS = Path(__file__).parent / "results" / "failover.json"
PROMPT = "Tell a long story about a lighthouse keeper, his dog and the sea. " * 5
STRIKE_AT_TOKENS = 120
REST_TOKENS = 50
"""What is still to come when a device is struck."""
GOALS_S = {signal.SIGKILL: 1.0, signal.SIGSTOP: 3.0}


def stream(
    service: LocalService, model: str, key: str, strike_at: int, strike: threading.Event
) -> tuple[str, list[float]]:
    """The text, and the times between its pieces in seconds; sets `strike` when it is time."""
    pieces: list[str] = []
    at_s: list[float] = []
    body = {
        "model": model,
        "messages": [{"role": "user", "content": PROMPT}],
        "temperature": 0,
        "max_tokens": strike_at + REST_TOKENS,
        "stream": True,
    }
    with httpx.stream(
        "POST",
        f"{service.api_url}/v1/chat/completions",
        json=body,
        headers={"authorization": f"Bearer {key}"},
        timeout=120,
        trust_env=False,
    ) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            piece = event["choices"][0]["delta"].get("content") if event.get("choices") else None
            if piece:
                pieces.append(piece)
                at_s.append(time.perf_counter())
                if len(pieces) == strike_at:
                    strike.set()
    return "".join(pieces), [after - before for before, after in pairwise(at_s)]


def running_chain(service: LocalService) -> list[str]:
    """The names of the devices of the one running answer."""
    while True:
        status = service.status()
        names = {beat.node: beat.name for beat in status.nodes}
        for gateway in status.gateways:
            for chain in gateway.chains:
                if chain and all(node in names for node in chain):
                    return [names[node] for node in chain]
        time.sleep(0.05)


def layers_anew(service: LocalService) -> int:
    """How many layers' rows the last repair had to compute anew."""
    log = (service.state_dir / "logs" / "gateway.log").read_text(encoding="utf-8")
    return int(re.findall(r"repaired in \d+ ms over .*, (\d+) layers anew", log)[-1])


def disturbed(
    service: LocalService, model: str, key: str, strike_at: int, kind: signal.Signals, place: int
) -> tuple[str, list[float], str]:
    """Stream an answer while one device of its chain is struck; what `stream` gives, and the place that was struck."""
    due = threading.Event()
    struck: list[int] = []
    where: list[str] = []

    def strike() -> None:
        due.wait(120)
        chain = running_chain(service)
        index = place % len(chain)
        where.append(f"{index + 1} of {len(chain)}")
        pids = service.device_pids(chain[index])
        for pid in pids:
            os.kill(pid, kind)
        struck.extend(pids)

    striker = threading.Thread(target=strike)
    striker.start()
    try:
        text, gaps_s = stream(service, model, key, strike_at, due)
    finally:
        due.set()
        striker.join()
        if kind is signal.SIGSTOP:
            for pid in struck:
                os.kill(pid, signal.SIGCONT)
    return text, gaps_s, where[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4, help="strikes of each kind")
    parser.add_argument("--strike-at", type=int, nargs="+", default=[STRIKE_AT_TOKENS], help="tokens of the answer")
    options = parser.parse_args()
    strikes = 2 * options.rounds
    pairs = [new_key() for _ in range((strikes + 1) * len(options.strike_at))]
    settings = "\n".join(
        f'[[gateway.keys]]\nid = "bench-{index}"\nsha256 = "{digest}"' for index, (_, digest) in enumerate(pairs)
    )
    keys = [secret for secret, _ in pairs]
    table = Table("at", "struck with", "place", "layers anew", "longest pause", "median between", "goal", "same text")
    rows = []
    with tempfile.TemporaryDirectory(prefix="fallow-bench-") as folder:
        root = Path(folder)
        manifest = ensure_default_model(Store(root / "store"))
        arguments = ["--nodes", "3", "--max-share", "0.7", "--memory", "1GiB", "--verbose"]
        with LocalService(root / "service", arguments, store=root / "store", settings=settings) as service:
            calm = ""
            for at, number in itertools.product(options.strike_at, range(strikes + 1)):
                service.wait_for(lambda fleet: len(fleet.nodes) == 3 and holders(fleet) >= 2, 90, "two copies of all")
                if number == 0:
                    calm, _ = stream(service, manifest.name, keys.pop(), at, threading.Event())
                    continue
                kind = (signal.SIGKILL, signal.SIGSTOP)[number % 2]
                text, gaps_s, where = disturbed(service, manifest.name, keys.pop(), at, kind, number // 2)
                pause_s, median_s = max(gaps_s), statistics.median(gaps_s)
                anew = layers_anew(service)
                row = {"at": at, "signal": kind.name, "place": where, "anew": anew, "pause_s": pause_s}
                rows.append({**row, "median_s": median_s, "same": text == calm})
                goal = f"{GOALS_S[kind]:.0f} s"
                same = "yes" if text == calm else "NO"
                figures = (str(anew), f"{pause_s:.2f} s", f"{median_s * 1000:.0f} ms")
                table.add_row(str(at), kind.name, where, *figures, goal, same)
    Console().print(table)
    for kind in GOALS_S:
        pauses = [float(row["pause_s"]) for row in rows if row["signal"] == kind.name]
        print(f"{kind.name}: median pause {statistics.median(pauses):.2f} s, longest {max(pauses):.2f} s")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
