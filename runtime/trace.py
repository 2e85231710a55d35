"""Where a request's time went, in Chrome's trace format (open it in chrome://tracing or ui.perfetto.dev)."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Trace:
    """Spans of time, in nanoseconds of ``time.perf_counter_ns``."""

    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, start: int, end: int, **details: Any) -> None:
        """Record that ``name`` took from ``start`` to ``end``."""
        event = {"name": name, "cat": "cachec", "ph": "X", "ts": start / 1e3, "dur": (end - start) / 1e3, "pid": 0, "tid": 0}
        self.events.append({**event, "args": details})

    def to_json(self) -> str:
        return json.dumps({"traceEvents": self.events, "displayTimeUnit": "ms"}, indent=1)

    def seconds(self) -> dict[str, float]:
        """Seconds by name, in the order of first appearance."""
        total: dict[str, float] = {}
        for event in self.events:
            total[event["name"]] = total.get(event["name"], 0.0) + event["dur"] / 1e6
        return total
