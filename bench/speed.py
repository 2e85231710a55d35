"""Speed beside the peers, in one process: ``python -m bench.speed`` writes ``bench/speed.json`` and ``bench/RESULTS.md``.

Rows take turns on the same prompts and noise, with a pause before each, so that the threads of the row before sleep. A peer
chooses its own steps; what it really computed is counted, and a cachec row runs on that very step set beside it. Seconds are of
the denoise loop with the prologue, medians over runs, with the quartiles.
"""

import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench.peers import Peer, Request, make_peers, make_requests, open_subject
from cachec.compiler.calibration.metrics import psnr_db
from cachec.compiler.calibration.prompts import default_prompts
from cachec.compiler.export import plan_engines
from cachec.compiler.forecast import engine_graphs, linear_graphs
from cachec.compiler.lower import lower_advance, lower_table, lower_uncached
from cachec.compiler.methods import get_method
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.schedule import Schedule, uniform_schedule
from cachec.compiler.split import split_model
from cachec.compiler.table import ForecastTable
from cachec.engines import get_backend
from cachec.runtime.engine import Engine
from cachec.runtime.program import Program, ProgramKey, hash_sigmas
from cachec.runtime.session import Session
from cachec.runtime.trace import Trace

STEPS = 50
BUDGETS = (7, 10)
BACKENDS = ("ort", "aoti")
PAUSE = 0.05  # seconds; OpenMP's and ONNX Runtime's threads spin for some milliseconds after a call
METHODS = {"hidden": ("taylor", {"order": "1"}), "output": ("adams", {"order": "2"})}


@dataclass(eq=False)
class Row:
    """Something that makes latents. ``family``: rows with the same uncached run; ``beside``: the peer whose steps it has."""

    name: str
    family: str
    run: Callable[[Request], torch.Tensor]
    computed: tuple[int, ...]
    beside: str | None = None
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)


class Bench:
    """The model, its requests, and the rows."""

    def __init__(self, model: LoadedModel, settings: Settings, prompts: Sequence[str]) -> None:
        self.model, self.settings = model, settings
        self.requests = make_requests(model, settings, prompts)
        self.sigmas, self.timesteps = model.sampling(settings)
        self.key = ProgramKey(settings.steps, hash_sigmas(self.sigmas), settings.height, settings.width, settings.text_tokens)
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {}

    def program(self, cut: str, schedule: Schedule) -> Program:
        name, options = METHODS[cut]
        table = get_method(name).with_options(options).table(schedule, self.sigmas, None)
        lower = lower_table if isinstance(table, ForecastTable) else lower_advance
        return lower(table, self.key, self.sigmas, self.timesteps)  # type: ignore[arg-type]

    def add_engines(self, backend: str, engines: Mapping[str, Engine], peers: Mapping[str, tuple[int, ...]]) -> None:
        """Rows of one back end of cachec: uncached, both cuts at each budget, and the step sets of the peers."""
        programs = {f"cachec {backend}, uncached": (lower_uncached(self.key, self.sigmas, self.timesteps), None)}
        for budget in BUDGETS:
            schedule = uniform_schedule(STEPS, budget)
            for cut in METHODS:
                programs[f"cachec {backend}, {cut} cut, {budget}"] = (self.program(cut, schedule), None)
        for peer, computed in peers.items():
            if 0 in computed and len(computed) < STEPS:
                programs[f"cachec {backend} on the steps of {peer}"] = (self.program("hidden", Schedule(STEPS, computed)), peer)
        for name, (program, beside) in programs.items():
            session = Session(engines, program, self.model.io)
            self.rows.append(Row(name, f"cachec {backend}", _session_run(session), program.compute_steps, beside))
            self.facts[name] = _trace(session, self.requests[0])

    def add_peer(self, peer: Peer) -> tuple[int, ...]:
        """A peer's row; returns the steps that it computed for the first request."""
        computed = peer.run(*self.requests[0]).computed
        family = "torch.compile" if peer.compiled else "diffusers"
        self.rows.append(Row(peer.name, family, lambda request: peer.run(*request).latents, computed))
        return computed

    def measure(self, repeats: int) -> None:
        """Rows take turns. The first run of each warms up and gives the pictures."""
        latents = {row.name: [row.run(request) for request in self.requests] for row in self.rows}
        base = {family: latents[name] for family, name in _uncached(self.rows).items()}
        for row in self.rows:
            for got, wanted in zip(latents[row.name], base[row.family], strict=True):
                pictures = [self.model.decode(x.numpy(), self.settings)[0] for x in (got, wanted)]
                row.psnr.append(psnr_db(*pictures))
        for number in range(repeats):
            order = self.rows if number % 2 == 0 else self.rows[::-1]
            for row in order:
                time.sleep(PAUSE)
                start = time.perf_counter()
                row.run(self.requests[number % len(self.requests)])
                row.seconds.append(time.perf_counter() - start)


def _session_run(session: Session) -> Callable[[Request], torch.Tensor]:
    def run(request: Request) -> torch.Tensor:
        conditions, noise = request
        return torch.from_numpy(session.run({name: value.numpy() for name, value in conditions.items()}, noise.numpy()))

    return run


def _trace(session: Session, request: Request) -> dict[str, Any]:
    """Median microseconds of each engine's calls, and of what lies between them, over some runs."""
    run, calls, outside = _session_run(session), dict[str, list[float]](), []
    run(request)
    for _ in range(5):
        session.trace = Trace()
        start = time.perf_counter()
        run(request)
        total = time.perf_counter() - start
        for event in session.trace.events:
            calls.setdefault(event["name"], []).append(event["dur"])
        outside.append((1e6 * total - sum(event["dur"] for event in session.trace.events)) / len(session.trace.events))
    session.trace = None
    medians = {name: round(statistics.median(values), 1) for name, values in calls.items()}
    return {**medians, "outside engines, per call": round(statistics.median(outside), 1)}


def _uncached(rows: Sequence[Row]) -> dict[str, str]:
    """The uncached row of each family."""
    return {row.family: row.name for row in rows if len(row.computed) == STEPS and row.beside is None}


def build(model: LoadedModel, settings: Settings, backend: str, out: Path, stack: ExitStack) -> tuple[dict[str, Engine], float]:
    """Engines for both cuts, and the seconds of building them from the split graphs."""
    split = split_model(model, settings)
    start = time.perf_counter()
    graphs = engine_graphs(model, linear_graphs(model, split, settings), "all")
    plans = plan_engines(graphs, model.example_inputs(settings), model.io.latents, settings.steps)
    kind = get_backend(backend)
    out.mkdir()
    signatures = {plan.name: plan.signature for plan in plans}
    paths = kind.build({plan.name: plan.program for plan in plans}, signatures, out)
    engines = {name: stack.enter_context(engine) for name, engine in kind.load(paths, signatures).items()}
    return engines, time.perf_counter() - start


def to_json(bench: Bench, repeats: int, builds: Mapping[str, float], skipped: Mapping[str, str]) -> dict[str, Any]:
    base = _uncached(bench.rows)
    median = {row.name: statistics.median(row.seconds) for row in bench.rows}
    rows = []
    for row in bench.rows:
        quartiles = statistics.quantiles(row.seconds, n=4)
        finite = [value for value in row.psnr if np.isfinite(value)]
        speedup = median[base[row.family]] / median[row.name]
        entry = {
            "name": row.name,
            "computed": list(row.computed),
            "seconds": median[row.name],
            "quartiles": [quartiles[0], quartiles[2]],
            "speedup": speedup,
            "of_ideal": speedup * len(row.computed) / STEPS,
            "over_diffusers": median["diffusers"] / median[row.name],
            "psnr_db": float(np.mean(finite)) if finite else None,
        }
        if row.beside is not None:
            entry["over_peer"] = median[row.beside] / median[row.name]
        rows.append(entry)
    return {
        "setting": {
            "model": bench.model.spec.name, "steps": STEPS, "prompts": len(bench.requests), "repeats": repeats,
            "threads": torch.get_num_threads(), "machine": _machine(), "torch": torch.__version__,
        },
        "rows": rows, "calls": bench.facts, "build_seconds": dict(builds), "skipped": dict(skipped),
    }  # fmt: skip


def _machine() -> str:
    try:
        names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    except OSError:
        return platform.processor()
    return f"{len(names)} cores, {names[0]}"


def report(data: Mapping[str, Any], date: str) -> str:
    setting, rows = data["setting"], data["rows"]
    lines = []
    for row in rows:
        psnr = "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        low, high = row["quartiles"]
        peer = f"{row['over_peer']:.2f}" if "over_peer" in row else "–"
        cells = (
            row["name"],
            len(row["computed"]),
            f"{row['seconds']:.4f} ({low:.4f}–{high:.4f})",
            f"{row['speedup']:.2f}",
            f"{row['of_ideal']:.3f}",
            f"{row['over_diffusers']:.2f}",
            peer,
            psnr,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    calls = [f"| {name} | " + ", ".join(f"{engine} {micro:.0f}" for engine, micro in facts.items()) + " |"
             for name, facts in data["calls"].items()]  # fmt: skip
    builds = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in data["build_seconds"].items())
    skipped = "".join(f"\n- Not run: {name}: {why}" for name, why in data["skipped"].items())
    where = f"{setting['threads']} threads on {setting['machine']}, torch {setting['torch']}"
    return f"""# Speed

{setting["model"]}, {setting["steps"]} steps, batch 1, float32, {where}, {date}.

`python -m bench.speed --prompts {setting["prompts"]} --repeats {setting["repeats"]}`: rows take turns in one process, same
prompts and noise; median seconds of the denoise loops (quartiles). *× uncached*: over the same engine's own uncached run. *of
ideal*: that over T/K. *× peer*: over the peer whose computed steps the row runs on. PSNR in dB against the row's own uncached
picture.

| row | computed | seconds | × uncached | of ideal | × diffusers | × peer | PSNR |
| --- | --- | --- | --- | --- | --- | --- | --- |
{chr(10).join(lines)}

Microseconds of one engine call, medians, and of the Python between two calls:

| row | calls |
| --- | --- |
{chr(10).join(calls)}

Building the engines from the split graphs took: {builds}.{skipped}

The spread is wide on a shared machine, so `of ideal` is good to some 0.05 only. The microseconds were taken without a pause
after other rows, whose threads still spun: they compare engines of a row, not rows.

Not measured yet: the FLUX-shaped model, peak memory, cold start, batches, tokens, and anything on a GPU.
"""


@click.command()
@click.option("--prompts", default=4, show_default=True)
@click.option("--repeats", default=12, show_default=True)
@click.option("--date", required=True, help="Day of the measurement, as 2026-11-21.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench/speed.json"), show_default=True)
def main(prompts: int, repeats: int, date: str, out: Path) -> None:
    logging.basicConfig(level=logging.ERROR)
    warnings.filterwarnings("ignore")
    spec = find_model("tiny-flux")
    model = load_model(spec)
    settings = Settings(spec.height, spec.width, spec.text_tokens, spec.guidance, STEPS, "float32")
    bench = Bench(model, settings, default_prompts("shapes", "eval")[:prompts])
    mask = (0, *(step + 1 for step in uniform_schedule(STEPS - 1, 9).compute))  # 0, 1, 2, 3: cache-dit wants four to begin
    made = make_peers(open_subject(model, settings), num_steps=STEPS, compute=mask)
    computed = {peer.name: bench.add_peer(peer) for peer in made.peers.values()}
    builds: dict[str, float] = {}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as work:
        for backend in BACKENDS:
            engines, builds[backend] = build(model, settings, backend, Path(work) / backend, stack)
            bench.add_engines(backend, engines, computed if backend == BACKENDS[0] else {})
            print(f"{backend}: built in {builds[backend]:.0f} s", flush=True)
        bench.measure(repeats)
        data = to_json(bench, repeats, builds, made.skipped)
    out.write_text(json.dumps(data, indent=1) + "\n")
    out.with_name("RESULTS.md").write_text(report(data, date))
    for row in data["rows"]:
        print(f"{row['name']:60s} {len(row['computed']):2d} {row['seconds']:.4f} s {row['of_ideal']:.3f} of ideal", flush=True)


if __name__ == "__main__":
    main()
