"""Rows beside each other: ``python -m bench.rows CASE WORK OUT``.

Rows take turns on the same prompts and noise, the peers in one process and each back end of cachec in one of its own: threads
of two libraries would spin against each other. A peer chooses its own steps; what it really computed is counted, and every
back end of cachec runs on that very step set, too.
"""

import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import click
import numpy as np
import torch

from bench.bundles import BACKENDS, load_engines
from bench.cases import METHODS, Case, open_case
from bench.peers import Peer, Peers, Request, make_peers
from bench.timing import part_arguments, settle, spread, timed, write_part
from cachec.compiler.models.base import tensors_from
from cachec.compiler.tables.schedule import Schedule, uniform_schedule
from cachec.runtime.engine import Engine
from cachec.runtime.session import Session
from cachec.runtime.specs import Array

SECOND_SETTINGS = ("diffusers FirstBlockCache 0.1", "cache-dit F8B0 TaylorSeer 1")  # left out where a run takes long

Runs = Callable[[Request], torch.Tensor]


@dataclass(eq=False)
class Row:
    """Something that makes latents. ``family``: rows with the same uncached run; ``beside``: peers whose steps it has."""

    name: str
    family: str
    run: Runs | None  # of the process that it lives in
    computed: tuple[int, ...]
    beside: tuple[str, ...] = ()
    once: bool = False  # a cache that skipped nothing
    seconds: list[float] = field(default_factory=list)
    request_seconds: list[float] = field(default_factory=list)
    latents: dict[int, Array] = field(default_factory=dict)  # by request


def peer_rows(case: Case) -> tuple[list[Row], dict[str, str]]:
    """The peers' rows, each run once to see which steps it computes, and why some are missing."""
    made = make_all_peers(case)
    rows, skipped = [], dict(made.skipped)
    for peer in made.peers.values():
        if not case.pictures and peer.name in SECOND_SETTINGS:
            skipped[peer.name] = "another setting of a cache that has a row"
            continue
        row = Row(peer.name, "torch.compile" if peer.compiled else "diffusers", _peer_run(peer), ())
        start = time.perf_counter()
        run = peer.run(*case.requests[0])
        row.computed, row.latents[0] = run.computed, run.latents.numpy()
        row.once = not case.sizes.warm and peer.name not in ("diffusers", "torch.compile") and len(run.computed) == case.steps
        if row.once:
            row.seconds.append(time.perf_counter() - start)
        rows.append(row)
    return rows, skipped


def make_all_peers(case: Case) -> Peers:
    """Those that can be told their steps get as many as the larger budget: 0 to 3, which cache-dit wants, then even ones."""
    rest = uniform_schedule(case.steps - 1, case.budgets[-1] - 1).compute
    return make_peers(case.subject(), num_steps=case.steps, compute=(0, *(step + 1 for step in rest)))


def cachec_rows(case: Case, backend: str, engines: Mapping[str, Engine], peers: Iterable[Row]) -> list[Row]:
    """A back end uncached, at each budget on both cuts, and on the step sets of the peers."""
    every = tuple(range(case.steps))
    shared: dict[tuple[int, ...], list[str]] = {}
    for peer in peers:
        if peer.name not in ("diffusers", "torch.compile"):
            shared.setdefault(peer.computed, []).append(peer.name)
    wanted = [("uncached", "hidden", every, tuple(shared.pop(every, ())))]
    for budget in case.budgets:
        schedule = uniform_schedule(case.steps, budget)
        wanted += [(f"{cut} cut, {budget}", cut, schedule.compute, ()) for cut in METHODS]
    for computed, names in shared.items():
        wanted.append((f"on the steps of {' and '.join(names)}", "hidden", computed, tuple(names)))
    rows = []
    for label, cut, computed, names in wanted:
        session = Session(engines, case.program(cut, Schedule(case.steps, computed)), case.model.io)
        if computed == every:
            warm_up(session, case.requests[0])
        elif backend == "inductor" or len(rows) == 1:  # torch.compile compiles when a graph first runs, for n = 1 again
            session_run(session)(case.requests[0])
        rows.append(Row(f"cachec {backend}, {label}", f"cachec {backend}", session_run(session), computed, names))
    return rows


def session_run(session: Session) -> Runs:
    def run(request: Request) -> torch.Tensor:
        conditions, noise = request
        return torch.from_numpy(session.run({name: value.numpy() for name, value in conditions.items()}, noise.numpy()))

    return run


def warm_up(session: Session, request: Request) -> None:
    """Prologue and first step: all engines of an uncached run."""
    conditions, noise = request
    session.begin({name: value.numpy() for name, value in conditions.items()}, noise.numpy())
    session.advance()


def _peer_run(peer: Peer) -> Runs:
    return lambda request: peer.run(*request).latents


def time_loop(case: Case, row: Row, index: int) -> None:
    """The denoise loop of one request."""

    def run() -> None:
        row.latents[index] = row.run(case.requests[index]).numpy()

    row.seconds.append(timed(run, run if case.sizes.warm else None))


def time_request(case: Case, row: Row, index: int) -> None:
    """A whole request: prompt encoding, loop, decoding. As in use, without a pause between these."""

    def run() -> None:
        conditions = tensors_from(case.model.encode([case.prompts[index]], case.settings, case.model.io.conditions))
        case.model.decode(row.run((conditions, case.requests[index][1])).numpy(), case.settings)

    row.request_seconds.append(timed(run))


Measure = Callable[[Case, Row, int], None]


class Library:
    """The peers (``None``) or a back end of cachec, in a process that works only while it is asked to; a context manager."""

    def __init__(self, backend: str | None, name: str, work: Path, *, quick: bool, peers: Sequence[Row] = ()) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, backend, name, work, quick, peers), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.rows, self.skipped = self._pipe.recv()

    def measure(self, what: Measure, number: int, index: int) -> None:
        """Have ``what`` measured of one row and request."""
        self._pipe.send((what, number, index))
        self.rows[number] = self._pipe.recv()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()


def serve(pipe: Connection, backend: str | None, name: str, work: Path, quick: bool, peers: Sequence[Row]) -> None:
    """What a library's process does."""
    quiet()
    case, skipped = open_case(name, work, quick=quick), dict[str, str]()
    with ExitStack() as stack:
        if backend is None:
            rows, skipped = peer_rows(case)
        else:
            rows = cachec_rows(case, backend, load_engines(work, case, backend, stack), peers)
        settle()
        pipe.send(([replace(row, run=None) for row in rows], skipped))
        while True:
            what, number, index = pipe.recv()
            what(case, rows[number], index)
            pipe.send(replace(rows[number], run=None))


def measure_all(case: Case, libraries: Sequence[Library], what: Measure, repeats: int) -> None:
    """Every row in turns; every other round goes backwards."""
    turns = [(library, number) for library in libraries for number in range(len(library.rows))]
    for round_number in range(repeats):
        for library, number in turns if round_number % 2 == 0 else turns[::-1]:
            if not (what is time_loop and library.rows[number].once):
                library.measure(what, number, round_number % len(case.requests))
        print(f"{what.__name__}: round {round_number + 1} of {repeats}", flush=True)


def quiet() -> None:
    logging.basicConfig(level=logging.ERROR)
    warnings.filterwarnings("ignore")


def to_json(case: Case, rows: Sequence[Row]) -> list[dict[str, Any]]:
    uncached = {
        row.family: row for row in rows if row.name in ("diffusers", "torch.compile") or row.name.endswith(", uncached")
    }
    eager = spread(uncached["diffusers"].seconds)["median"]
    entries = []
    for row in rows:
        seconds, base = spread(row.seconds), uncached[row.family]
        speedup = spread(base.seconds)["median"] / seconds["median"]
        scores = [case.psnr(latents, base.latents[index]) for index, latents in row.latents.items() if index in base.latents]
        finite = [score for score in scores if np.isfinite(score)]
        entries.append({
            "name": row.name, "family": row.family, "computed": list(row.computed), "beside": list(row.beside),
            "runs": len(row.seconds), "seconds": seconds, "speedup": speedup,
            "of_ideal": speedup * len(row.computed) / case.steps, "over_diffusers": eager / seconds["median"],
            "psnr_db": float(np.mean(finite)) if finite else None,
            "request_seconds": spread(row.request_seconds) if row.request_seconds else None,
        })  # fmt: skip
    return entries


@click.command()
@part_arguments("name")
def main(name: str, work: Path, out: Path, quick: bool) -> None:
    quiet()
    case = open_case(name, work, quick=quick)
    with ExitStack() as stack:
        peers = stack.enter_context(Library(None, name, work, quick=quick))
        print(f"{len(peers.rows)} peers", flush=True)
        libraries = [peers]
        for backend in BACKENDS:
            libraries.append(stack.enter_context(Library(backend, name, work, quick=quick, peers=peers.rows)))
            print(f"{backend}: loaded", flush=True)
        measure_all(case, libraries, time_loop, case.sizes.repeats)
        measure_all(case, libraries, time_request, case.sizes.request_repeats)
        entries = to_json(case, [row for library in libraries for row in library.rows])
    write_part(out, {
        "case": name, "steps": case.steps, "requests": len(case.requests), "repeats": case.sizes.repeats,
        "pictures": case.pictures, "rows": entries, "skipped": peers.skipped,
    })  # fmt: skip


if __name__ == "__main__":
    main()
