"""What the gateway measures, for Prometheus. No prompt, key or owner is ever a label.

Each app has its own registry, so that several gateways in one process (tests, the simulator) do not mix.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily

FIRST_TOKEN_BUCKETS_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
NEXT_TOKEN_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0, 10.0)

WAIT_BUCKETS_S = (0.005, 0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class GatewayMetrics:
    """Counters of one gateway. Also the `Observer` of its generations."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fallow_http_requests", "Requests answered.", ("route", "status"), registry=self.registry
        )
        self.refusals = Counter(
            "fallow_refusals", "Requests refused, by error code.", ("code",), registry=self.registry
        )
        self.disconnects = Counter(
            "fallow_client_disconnects", "Answers that ended because the client hung up.", registry=self.registry
        )
        tokens = Counter("fallow_tokens", "Tokens, by kind.", ("kind",), registry=self.registry)
        self.prompt_tokens = tokens.labels("prompt")
        self.cached_tokens = tokens.labels("cached")
        self._completion_tokens = tokens.labels("completion")
        self.generated_tokens = 0
        """Tokens generated since the start, for rates in status reports."""
        self.active_choices = 0
        self._waiting = Gauge("fallow_waiting_requests", "Requests that wait for a place.", registry=self.registry)
        self._places = Gauge("fallow_places", "Answers that may be generated at once.", registry=self.registry)
        self._quarantined = Gauge(
            "fallow_quarantined_devices",
            "Devices of the fleet that are out of service on suspicion.",
            registry=self.registry,
        )
        self._standing_by = Gauge(
            "fallow_standby_chains", "Chains that stand by for another one.", registry=self.registry
        )
        self._takeovers: Callable[[], int] = lambda: 0
        self.registry.register(self)
        self._waited = Histogram(
            "fallow_waited_seconds",
            "How long admitted requests waited for their place.",
            buckets=WAIT_BUCKETS_S,
            registry=self.registry,
        )
        self._active = Gauge("fallow_active_choices", "Choices that are being generated.", registry=self.registry)
        self._first = Histogram(
            "fallow_first_token_seconds",
            "From opening a conversation to its first token.",
            buckets=FIRST_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self._next = Histogram(
            "fallow_next_token_seconds",
            "From one token to the next.",
            buckets=NEXT_TOKEN_BUCKETS_S,
            registry=self.registry,
        )

    def first_token(self, elapsed_s: float) -> None:
        self._first.observe(elapsed_s)
        self._token()

    def next_token(self, elapsed_s: float) -> None:
        self._next.observe(elapsed_s)
        self._token()

    def door(self, waiting: int, places: int) -> None:
        """How many requests wait, and how many answers may run."""
        self._waiting.set(waiting)
        self._places.set(places)

    def watch_standbys(self, standing_by: Callable[[], int], takeovers: Callable[[], int]) -> None:
        """Where to ask how many chains stand by, and how many have taken over since the start."""
        self._standing_by.set_function(standing_by)
        self._takeovers = takeovers

    def collect(self) -> Iterator[Metric]:
        """What is counted elsewhere."""
        yield CounterMetricFamily(
            "fallow_standby_takeovers", "Answers that went on with the chain that stood by.", self._takeovers()
        )

    def watch_quarantine(self, count: Callable[[], int]) -> None:
        """Where to ask how many devices are in quarantine."""
        self._quarantined.set_function(count)

    def waited(self, elapsed_s: float) -> None:
        self._waited.observe(elapsed_s)

    def choices_changed(self, change: int) -> None:
        self.active_choices += change
        self._active.set(self.active_choices)

    def _token(self) -> None:
        self.generated_tokens += 1
        self._completion_tokens.inc()

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
