"""The fast mode at full size, and how far it is from the detailed mode.

Every shipped scenario with a million devices (`--devices`): success rate, refusals, latency, utilisation, wall time and
processor time; the promise is 24 h in at most 10 minutes on 2 cores. Then, with `--validate`, the same small fleets
through both modes: a table of differences, and the tolerances that `tests/simulation/test_fast_against_detailed.py`
holds.

    python benchmarks/million.py --out build/million     # JSON for each scenario, and report.html
    python benchmarks/million.py --devices 100000 --only home-evenings --times 60
    python benchmarks/million.py --validate
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import msgspec

from fallow.simulator import shipped
from fallow.simulator.fast import run_fast
from fallow.simulator.report import write_report
from fallow.simulator.results import RunResult, write_result
from fallow.simulator.runner import run_detailed
from fallow.simulator.scenario import Scenario, decode_scenario

DAY_MINUTES_MAX = 10.0
VALIDATION = """
name = "validation"
title = "Both modes, the same fleet"
about = "Devices that come and go at random; scenario, seed and fleet are the same in both modes."
hours = {hours}
start_hour_of_week = 34

[detailed]
devices = {devices}
hours = {hours}

[traffic]
sessions_per_hour_per_device = {rate}
prompt_tokens = 100
completion_tokens = 60

[[populations]]
name = "desktops"
habit = "memoryless"
count = {devices}
layer_s = 0.004
memory_bytes = 4294967296
median_up_s = {up_s}
median_down_s = {down_s}
"""
CASES = {
    "light": {"hours": 0.25, "devices": 40, "rate": 8, "up_s": 7200, "down_s": 3600},
    "half": {"hours": 0.25, "devices": 40, "rate": 70, "up_s": 7200, "down_s": 3600},
    "heavy": {"hours": 0.15, "devices": 40, "rate": 150, "up_s": 7200, "down_s": 3600},
    "churn": {"hours": 0.25, "devices": 40, "rate": 30, "up_s": 900, "down_s": 450},
}
"""By name: 40 devices for a quarter of an hour, from idle to busy, and with devices that hardly stay."""


def validation(case: str) -> Scenario:
    """The small scenario of a case."""
    return decode_scenario(VALIDATION.format(**CASES[case]), case)


def cpu_s() -> float:
    """Processor time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def memory_mib() -> float:
    """The most that this process and, of its children, the largest took."""
    used = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used) / 1024


def share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.3f} %" if whole else "none"


def seconds(value: float | None) -> str:
    return "     -" if value is None else f"{value:6.2f}"


def asked_more(scenario: Scenario, times: float) -> Scenario:
    """The scenario with so many times its traffic."""
    rate = times * scenario.traffic.sessions_per_hour_per_device
    traffic = msgspec.structs.replace(scenario.traffic, sessions_per_hour_per_device=rate)
    return msgspec.structs.replace(scenario, traffic=traffic)


def full_size(names: list[str], devices: int, times: float, seed: int, processes: int, out: Path) -> bool:
    """Run scenarios at full size. Whether each took no more than its share of ten minutes for a day."""
    results: list[RunResult] = []
    in_time = True
    print(f"{devices:,} devices, {times:g} times the traffic, seed {seed}, {processes} processes")
    print(
        "scenario             hours  success    refused    util   first p50/p99 s   token p50/p99 s  wall s   cpu s"
        "  min/day"
    )
    for name in names:
        before = cpu_s()
        result = run_fast(asked_more(shipped.scenario(name), times), seed, devices, processes=processes)
        spent = cpu_s() - before
        totals = result.totals
        days = result.simulated_s / 86400
        minutes = result.wall_s / 60 / days
        in_time = in_time and minutes <= DAY_MINUTES_MAX
        print(
            f"{name:20} {result.simulated_s / 3600:5g}  {100 * totals.success_rate:7.4f} "
            f"{share(totals.sessions_refused, totals.sessions_started):>10} {100 * (totals.utilisation or 0):6.2f} % "
            f"{seconds(totals.first_token_p50_s)} /{seconds(totals.first_token_p99_s)}  "
            f"{seconds(totals.inter_token_p50_s)} /{seconds(totals.inter_token_p99_s)} "
            f"{result.wall_s:7.1f} {spent:7.1f} {minutes:8.2f}",
            flush=True,
        )
        write_result(result, out / f"{name}.json")
        results.append(result)
    write_report(results, out / "report.html")
    print(f"memory: {memory_mib():.0f} MiB (this process and the largest of the others); pages and JSON in {out}")
    print(f"a day of {devices:,} devices in at most {DAY_MINUTES_MAX:g} minutes: {'met' if in_time else 'NOT MET'}")
    return in_time


FIGURES = (
    "sessions_started", "success_rate", "sessions_refused", "tokens_served", "utilisation", "first_token_p50_s",
    "first_token_p99_s", "inter_token_p50_s", "inter_token_p99_s", "hops_mean", "repairs", "stall_p95_s", "orders",
    "bytes_moved",
)  # fmt: skip


def validate(cases: list[str], seeds: list[int], out: Path) -> None:
    """Both modes on the same small fleets. Prints ratios fast / detailed."""
    for case in cases:
        for seed in seeds:
            scenario = validation(case)
            began = time.perf_counter()
            detailed = run_detailed(scenario, seed)
            detailed_s = time.perf_counter() - began
            fast = run_fast(scenario, seed, scenario.detailed.devices, processes=1)
            write_result(detailed, out / f"{case}-{seed}-detailed.json")
            write_result(fast, out / f"{case}-{seed}-fast.json")
            write_report([fast, detailed], out / f"{case}-{seed}.html")
            print(f"\n{case}, seed {seed}: {CASES[case]}; detailed took {detailed_s:.0f} s, fast {fast.wall_s:.1f} s")
            compare(fast, detailed)


def compare(fast: RunResult, detailed: RunResult) -> None:
    """The table of differences."""
    print(f"  {'':22} {'fast':>14} {'detailed':>14}   ratio")
    rows = [(name, getattr(fast.totals, name), getattr(detailed.totals, name)) for name in FIGURES]
    for name in ("devices_available", "capacity_tokens_per_s"):
        rows.append((name, *(mean_of(result, name) for result in (fast, detailed))))
    for name, one, other in rows:
        ratio = f"{one / other:7.2f}" if one is not None and other else "      -"
        print(f"  {name:22} {figure(one):>14} {figure(other):>14} {ratio}")


def mean_of(result: RunResult, name: str) -> float:
    values = [getattr(sample, name) or 0.0 for sample in result.samples]
    return sum(values) / len(values)


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1_000_000)
    parser.add_argument("--only", action="append", help="a scenario; may be repeated")
    parser.add_argument("--times", type=float, default=1.0, help="ask so many times as much as the scenario says")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="of a validation")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--case", action="append", choices=CASES, help="of a validation; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("build/million"))
    chosen = parser.parse_args()
    if chosen.validate:
        validate(chosen.case or list(CASES), list(range(1, chosen.seeds + 1)), chosen.out)
        return
    names = chosen.only or list(shipped.names())
    if not full_size(names, chosen.devices, chosen.times, chosen.seed, chosen.processes, chosen.out):
        sys.exit(1)


if __name__ == "__main__":
    main()
