"""How cost grows, tiny-flux: ``python -m bench.scaling tokens|steps|batch WORK OUT``.

``tokens``: single calls at other resolutions, engines built for each. ``steps`` and ``batch``: whole loops by
computed steps and by batch.
"""

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.bundles import load_engines
from bench.cases import METHODS, Case, at_size, tiny_command
from bench.pairs import Traced, summarise_calls
from bench.peers import Request, make_peer, plain
from bench.rows import session_run
from bench.timing import repeat_for, settle, spread
from cachec.compiler.graphs.build_engines import linear_engines
from cachec.compiler.tables.schedule import Schedule, uniform_schedule
from cachec.runtime.session import Session

TOKENS = (64, 256, 1024, 4096)
TOKEN_STEPS, TOKEN_COMPUTE = 8, (0, 1, 7)  # one run of five forecasts
BUDGETS = (5, 7, 10, 15, 20, 30, 40, 50)
BATCHES = (1, 2, 4, 8)
BATCH_BUDGET = 10
PEER_STEPS = 2


def measure_tokens(case: Case, work: Path, *, quick: bool) -> dict[str, Any]:
    """Seconds of a computed step and of a run of five forecasts, beside the same transformer eager and compiled."""
    rows = []
    for tokens in TOKENS[:2] if quick else TOKENS:
        side = 2 * case.model.pipeline.vae_scale_factor * math.isqrt(tokens)
        sized = at_size(case, pixels=side, steps=TOKEN_STEPS)
        rows.append({"tokens": tokens, "pixels": side, **_measure_size(sized, budget=2.0 if quick else 10.0)})
        print(f"{tokens} tokens: {1e3 * rows[-1]['ort']['median']:.1f} ms a step", flush=True)
    return {"rows": rows, "text_tokens": case.settings.text_tokens, "forecasts": len(_gap())}


def _gap() -> list[int]:
    return [step for step in range(TOKEN_STEPS) if step not in TOKEN_COMPUTE]


def _measure_size(case: Case, budget: float) -> dict[str, Any]:
    request, result = case.requests[0], {}
    for name, compiled in (("diffusers", False), ("torch.compile", True)):
        peer = make_peer(plain(), case.subject(), num_steps=PEER_STEPS, compiled=compiled)
        peer.run(*request)
        spent = repeat_for(lambda peer=peer: peer.run(*request), budget)
        result[name] = spread([seconds / PEER_STEPS for seconds in spent])
    with ExitStack() as stack, tempfile.TemporaryDirectory() as out:
        engines = linear_engines(case.model, case.settings, "ort", Path(out), stack)
        session = Session(engines, case.program("hidden", Schedule(TOKEN_STEPS, TOKEN_COMPUTE)), case.model.io)
        session_run(session)(request)
        traced = Traced(session)
        repeat_for(lambda: traced(request), budget)
        calls = summarise_calls(traced.runs)["calls"]
        result["ort"] = {"median": calls["compute"] / 1e6}
        result["forecast run"] = {"median": calls["forecast"] / 1e6}
    return result


def measure_steps(case: Case, work: Path, *, quick: bool) -> dict[str, Any]:
    """Seconds of the loop by computed steps, both cuts, in turns."""
    with ExitStack() as stack:
        engines = load_engines(work, case, "ort", stack)
        sessions = {
            (cut, budget): Session(engines, case.program(cut, uniform_schedule(case.steps, budget)), case.model.io)
            for cut in METHODS
            for budget in BUDGETS
        }
        runs = {key: session_run(session) for key, session in sessions.items()}
        spent = in_turns({key: bound(run, case.requests[0]) for key, run in runs.items()}, 2 if quick else 15)
    return {"rows": [{"cut": cut, "budget": budget, **spread(spent[cut, budget])} for cut, budget in sessions]}


def measure_batch(case: Case, work: Path, *, quick: bool) -> dict[str, Any]:
    """Seconds of the loop by batch, uncached and with ten computed steps."""
    schedules = {"uncached": case.steps, f"hidden cut, {BATCH_BUDGET}": BATCH_BUDGET}
    conditions, noise = case.requests[0]
    with ExitStack() as stack:
        engines, calls = load_engines(work, case, "ort", stack), {}
        for batch in BATCHES:
            request = ({name: _repeat(value, batch) for name, value in conditions.items()}, _repeat(noise, batch))
            for name, budget in schedules.items():
                program = case.program("hidden", uniform_schedule(case.steps, budget))
                session = Session(engines, program, case.model.io, batch=batch)
                calls[name, batch] = bound(session_run(session), request)
        spent = in_turns(calls, 2 if quick else 7)
    return {"rows": [{"name": name, "batch": batch, **spread(spent[name, batch])} for name, batch in calls]}


def _repeat(value: Any, batch: int) -> Any:
    return value.repeat(batch, *[1] * (value.ndim - 1))


def bound(run: Callable[[Request], object], request: Request) -> Callable[[], object]:
    """``run`` on one request."""
    return lambda: run(request)


def in_turns(calls: Mapping[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """Seconds of each call, after one untimed round; every other round goes backwards."""
    for call in calls.values():
        call()
    settle()
    spent: dict[Any, list[float]] = {key: [] for key in calls}
    for number in range(rounds):
        for key in list(calls)[:: 1 if number % 2 == 0 else -1]:
            spent[key] += repeat_for(calls[key], 0, least=1)
    return spent


main = tiny_command({"tokens": measure_tokens, "steps": measure_steps, "batch": measure_batch})


if __name__ == "__main__":
    main()
