"""What a session costs beside its engines, tiny-flux: ``python -m bench.session_costs overhead|requests|slots WORK OUT``.

``overhead``: Python between engine calls, with engines that do nothing. ``requests``: memory over a thousand requests.
``slots``: features stored in float16.
"""

import resource
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import cachec
from bench.bundles import load_engines
from bench.cases import METHODS, Case, tiny_command
from bench.pairs import make_sessions
from bench.rows import session_run
from bench.scaling import bound, in_turns
from bench.timing import spread
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from cachec.compiler.tables.schedule import uniform_schedule
from cachec.runtime.device import Buffer, Device
from cachec.runtime.engine import Call, Engine, ExecutionContext
from cachec.runtime.session import Session
from cachec.runtime.specs import Array

SLOTS_PROMPTS = 16


class NullCall(Call):
    """Does nothing."""

    def run(self) -> None:
        pass


class NullContext(ExecutionContext):
    """Binds to nothing."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        return NullCall()


class NullEngine(Engine):
    """Stands for an engine of the same signature and does nothing."""

    name = "null"

    def _context(self, native: Any, device: Device) -> ExecutionContext:
        return NullContext()

    @staticmethod
    def version() -> str:
        return "0"

    @staticmethod
    def check_target(*_: Any) -> None:
        pass

    @classmethod
    def load(cls, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("null engines are not loaded")


def measure_overhead(case: Case, work: Path, *, quick: bool) -> dict[str, Any]:
    """Microseconds of a request without engines: its start (checks and copies), and each call after it."""
    conditions, noise = case.requests[0]
    given = {name: value.numpy() for name, value in conditions.items()}, noise.numpy()
    with ExitStack() as stack:
        engines = {
            name: NullEngine(object(), engine.signature, engine.device)
            for name, engine in load_engines(work, case, "ort", stack).items()
        }
        uncached, cached = make_sessions(case, engines, case.budgets)
    rows = []
    for name, session in {"uncached": uncached, **cached}.items():
        starts, calls = [], []
        for _ in range(20 if quick else 300):
            start = time.perf_counter_ns()
            session.begin(*given)
            begun = time.perf_counter_ns()
            while not session.finished:
                session.advance()
            calls.append((time.perf_counter_ns() - begun) / 1e3 / len(session.program.instructions))
            starts.append((begun - start) / 1e3)
        rows.append({
            "name": name, "calls": len(session.program.instructions), "start": spread(starts), "call": spread(calls),
        })  # fmt: skip
    return {"rows": rows}


def measure_requests(case: Case, work: Path, *, quick: bool) -> dict[str, Any]:
    """Resident bytes after fifty requests, and after a thousand more."""
    count, budget = 20 if quick else 1000, case.budgets[0]
    with ExitStack() as stack:
        engines = load_engines(work, case, "ort", stack)
        session = Session(engines, case.program("hidden", uniform_schedule(case.steps, budget)), case.model.io)
        run = session_run(session)
        for _ in range(50):
            run(case.requests[0])
        before = _resident()
        for number in range(count):
            run(case.requests[number % len(case.requests)])
        return {"requests": count, "budget": budget, "before": before, "after": _resident()}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure_slots(case: Case, work: Path, *, quick: bool) -> dict[str, Any]:
    """PSNR and seconds with slots of float32 and of float16, both cuts."""
    many = replace(case, sizes=replace(case.sizes, prompts=2 if quick else SLOTS_PROMPTS))
    rows = []
    with ExitStack() as stack:
        plain = load_engines(work, case, "ort", stack)
        uncached, _ = make_sessions(case, plain, ())
        wanted = [session_run(uncached)(request).numpy() for request in many.requests]
        for cut in METHODS:
            half = stack.enter_context(cachec.load(_compile_half(case, cut, stack))).engines
            program = case.program(cut, uniform_schedule(case.steps, case.budgets[-1]))
            sessions = {"float32": Session(plain, program, case.model.io), "float16": Session(half, program, case.model.io)}
            latents = {
                dtype: [session_run(one)(request).numpy() for request in many.requests] for dtype, one in sessions.items()
            }
            seconds = in_turns({dtype: bound(session_run(one), case.requests[0]) for dtype, one in sessions.items()},
                                3 if quick else 15)  # fmt: skip
            rows += [
                {
                    "cut": cut, "slots": dtype, "bytes": sum(slots.nbytes for slots in session.slots.values()),
                    "seconds": spread(seconds[dtype]), "psnr_db": _mean_psnr(case, latents[dtype], wanted),
                }
                for dtype, session in sessions.items()
            ]  # fmt: skip
            rows[-1]["psnr_from_float32"] = _mean_psnr(case, latents["float16"], latents["float32"])
    return {"rows": rows, "budget": case.budgets[-1], "prompts": len(wanted)}


def _mean_psnr(case: Case, latents: Sequence[Array], reference: Sequence[Array]) -> float:
    return statistics.mean(case.psnr(*pair) for pair in zip(latents, reference, strict=True))


def _compile_half(case: Case, cut: str, stack: ExitStack) -> Path:
    name, options = METHODS[cut]
    request = make_request(
        case.model.spec, method=name, options=options, steps=case.steps, budget=case.budgets[-1], schedule="uniform",
        slots="float16",
    )  # fmt: skip
    out = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "half.cachec"
    compile_bundle(case.model, request, out)
    return out


main = tiny_command({"overhead": measure_overhead, "requests": measure_requests, "slots": measure_slots})


if __name__ == "__main__":
    main()
