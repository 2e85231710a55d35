"""What a server counts and times, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cachec.runtime.lane_request import Tick

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
ROWS = (1, 2, 4, 8, 16, 32, 64)
NAMED = ("model", "level")


class Metrics:
    """One server's; two in a process do not share."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self.queued = Gauge("cachec_queued_requests", "Samples that wait for a lane.", ["model"], registry=own)
        self.running = Gauge("cachec_running_requests", "Samples in lanes.", ["model"], registry=own)
        self.requests = Counter("cachec_requests", "Requests by how they ended.", [*NAMED, "outcome"], registry=own)
        self.refused = Counter("cachec_refused", "Requests that were not taken, by reason.", ["reason"], registry=own)
        self.misses = Counter("cachec_deadline_misses", "Deadlines that were not kept, or could not be.", NAMED, registry=own)
        self.request_seconds = Histogram(
            "cachec_request_seconds", "From taken to made, waiting included.", NAMED, registry=own, buckets=SECONDS
        )
        self.queue_seconds = Histogram(
            "cachec_queue_seconds", "From handed to the lanes to the first step.", NAMED, registry=own, buckets=SECONDS
        )
        self.step_seconds = Histogram(
            "cachec_step_seconds",
            "A tick: one computed step of a batch, with the forecasts behind it.",
            NAMED,
            registry=own,
            buckets=SECONDS,
        )
        self.encode_seconds = Histogram(
            "cachec_encode_seconds", "Text to conditions.", ["model"], registry=own, buckets=SECONDS
        )
        self.decode_seconds = Histogram("cachec_decode_seconds", "Latents to a file.", ["model"], registry=own, buckets=SECONDS)
        self.batch_rows = Histogram(
            "cachec_batch_rows", "Rows of the model's batches, without padding.", ["model"], registry=own, buckets=ROWS
        )

    def watch(self, model: str, queued: Callable[[], float], running: Callable[[], float]) -> None:
        """Ask these when the metrics are read."""
        self.queued.labels(model).set_function(queued)
        self.running.labels(model).set_function(running)

    def note(self, model: str, tick: Tick) -> None:
        """What a tick did. For the thread that ticks."""
        self.batch_rows.labels(model).observe(tick.rows)
        for level in {ticket.level for ticket in tick.tickets}:
            self.step_seconds.labels(model, level).observe(tick.seconds)

    def in_text(self) -> bytes:
        return generate_latest(self._registry)
