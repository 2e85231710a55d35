"""Uncached and cached runs side by side, one back end in a process: ``python -m bench.pairs CASE BACKEND WORK OUT``.

Medians of runs far apart drift with the machine; a ratio of neighbours does not. Each uncached run stands between two cached
ones and makes a pair with both. More cached runs are traced behind them: where the microseconds of one engine call go.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click

from bench.bundles import load_engines
from bench.cases import METHODS, Case, open_case
from bench.peers import Request
from bench.rows import session_run, warm_up
from bench.timing import part_arguments, settle, spread, timed, write_part
from cachec.compiler.tables.schedule import Schedule, uniform_schedule
from cachec.runtime.session import Session
from cachec.runtime.trace import Trace

LEAST_ROUNDS = 2
TRACED_RUNS = 10  # of each session, where they take milliseconds


@dataclass
class Traced:
    """Runs of a session, each with its events and its microseconds."""

    session: Session
    runs: list[tuple[list[dict[str, Any]], float]] = field(default_factory=list)

    def __call__(self, request: Request) -> None:
        """Tracing costs a few microseconds a call."""
        self.session.trace = Trace()
        start = time.perf_counter()
        session_run(self.session)(request)
        self.runs.append((self.session.trace.events, 1e6 * (time.perf_counter() - start)))
        self.session.trace = None


def measure_pairs(case: Case, uncached: Session, cached: Mapping[str, Session]) -> dict[str, list[float]]:
    """Seconds uncached over seconds cached, by name, one per round. Both sides of a pair are warmed by the same run."""
    sizes, request, started = case.sizes, case.requests[0], time.perf_counter()
    ratios: dict[str, list[float]] = {name: [] for name in cached}
    labels, number, last = list(cached), 0, 0.0
    slow = session_run(uncached)
    while number < sizes.pair_rounds:
        begun = time.perf_counter()
        if number >= LEAST_ROUNDS and begun - started + last > sizes.pair_seconds:
            break
        for names in zip(labels[::2], labels[1::2], strict=True):
            first, second = names if number % 2 == 0 else names[::-1]
            warm = partial(session_run(cached[names[0]]), request) if sizes.warm else None
            turns = (session_run(cached[first]), slow, session_run(cached[second]))
            before, between, after = (timed(partial(run, request), warm) for run in turns)
            ratios[first].append(between / before)
            ratios[second].append(between / after)
        number += 1
        last = time.perf_counter() - begun
    return ratios


def summarise_calls(runs: Sequence[tuple[Sequence[Mapping[str, Any]], float]]) -> dict[str, Any]:
    """Where a request's microseconds go, medians over its runs.

    ``calls`` is one call of each engine, ``forecasts`` one by how many it makes, ``outside`` what lies between two calls,
    ``whole`` all calls of a request by engine; ``share`` a forecast over a computed step.
    """
    calls: dict[str, list[float]] = {}
    whole: dict[str, list[float]] = {}
    forecasts: dict[int, list[float]] = {}
    outside = []
    for events, total in runs:
        spent: dict[str, float] = {}
        for event in events:
            calls.setdefault(event["name"], []).append(event["dur"])
            spent[event["name"]] = spent.get(event["name"], 0.0) + event["dur"]
            if event["name"] == "forecast":
                forecasts.setdefault(len(event["args"]["steps"]), []).append(event["dur"])
        for name, micro in {**spent, "outside": total - sum(spent.values())}.items():
            whole.setdefault(name, []).append(micro)
        outside.append(whole["outside"][-1] / len(events))
    medians = {name: statistics.median(values) for name, values in calls.items()}
    by_count = {num: statistics.median(values) for num, values in sorted(forecasts.items())}
    result: dict[str, Any] = {
        "calls": medians, "forecasts": by_count, "outside": statistics.median(outside),
        "whole": {name: statistics.median(values) for name, values in whole.items()},
    }  # fmt: skip
    if forecasts:
        total = sum(by_count[num] * len(values) for num, values in forecasts.items())
        result["share"] = total / sum(num * len(values) for num, values in forecasts.items()) / medians["compute"]
    return result


def pair_json(case: Case, ratios: dict[str, list[float]], computed: dict[str, int]) -> list[dict[str, Any]]:
    return [
        {"name": name, "computed": computed[name], "ideal": case.steps / computed[name], "ratios": values,
         "ratio": spread(values), "of_ideal": spread([value * computed[name] / case.steps for value in values])}
        for name, values in ratios.items()
    ]  # fmt: skip


def make_sessions(case: Case, engines: Any, budgets: Sequence[int]) -> tuple[Session, dict[str, Session]]:
    """The uncached session, and those of both cuts at each budget; two neighbours are of one cut."""
    every = Schedule(case.steps, tuple(range(case.steps)))
    cached = {
        f"{cut} cut, {budget}": Session(engines, case.program(cut, uniform_schedule(case.steps, budget)), case.model.io)
        for cut in METHODS
        for budget in budgets
    }
    return Session(engines, case.program("hidden", every), case.model.io), cached


@click.command()
@part_arguments("name", "backend")
def main(name: str, backend: str, work: Path, out: Path, quick: bool) -> None:
    case = open_case(name, work, quick=quick)
    request = case.requests[0]
    with ExitStack() as stack:
        uncached, cached = make_sessions(case, load_engines(work, case, backend, stack), case.budgets)
        warm_up(uncached, request)
        for number, session in enumerate(cached.values()):
            if backend == "inductor" or number == 0:  # torch.compile compiles when a graph first runs, for n = 1 again
                session_run(session)(request)
        settle()
        ratios = measure_pairs(case, uncached, cached)
        traced = {label: Traced(session) for label, session in cached.items()}
        for _ in range(TRACED_RUNS if case.sizes.warm else 1):
            for one in traced.values():
                timed(partial(one, request))
        calls = {label: summarise_calls(one.runs) for label, one in traced.items()}
        pairs = pair_json(case, ratios, {label: len(session.program.compute_steps) for label, session in cached.items()})
    write_part(out, {"case": name, "backend": backend, "steps": case.steps, "pairs": pairs, "calls": calls})


if __name__ == "__main__":
    main()
