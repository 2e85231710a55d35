"""The speed bench's pure parts: its FLUX-shaped model at a small size, and its report from a JSON. Nothing is timed."""

import json

import numpy as np
import pytest

import cachec
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import engine, linear, prepare
from cachec.compiler.tables.schedule import Schedule
from cachec.engines.eager import EagerEngine
from cachec.runtime.device import Host
from cachec.runtime.noise import make_noise
from cachec.runtime.session import Session

cases = pytest.importorskip("bench.cases", reason="the source tree is not beside the tests")
bench_rows = pytest.importorskip("bench.rows")
session_costs = pytest.importorskip("bench.session_costs")
speed = pytest.importorskip("bench.speed", reason="matplotlib is not installed")
speed_report = pytest.importorskip("bench.speed_report")

FACTS = {
    "date": "2026-01-02", "cpu": "a CPU", "cores": 2, "threads": 2, "memory_gib": 8, "python": "3.11.0",
    "versions": {"torch": "2.13.0"},
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    cases.write_weights(path / "weights", {**cases.SMALL_CONFIG, "num_single_layers": 1})
    return path


def test_the_flux_shaped_model_splits_and_a_session_equals_the_transformer(work):
    case = cases.open_case(cases.SHAPED, work, quick=True)
    assert isinstance(case.model, cases.FluxShaped)
    graphs = engine(linear(prepare(case.model, case.settings)), case.model.io)
    plans = plan_engines(graphs, case.model.example_inputs(case.settings), case.model.io.latents, case.settings.steps)
    engines = {plan.name: EagerEngine(graphs.modules[plan.name], plan.signature, Host()) for plan in plans}
    program = case.program("hidden", Schedule(case.steps, tuple(range(case.steps))))
    conditions, noise = case.requests[0]
    given = {name: value.numpy() for name, value in conditions.items()}
    latents = Session(engines, program, case.model.io).run(given, noise.numpy())
    np.testing.assert_allclose(latents, case.model.generate(given, noise.numpy(), case.settings), atol=2e-4, rtol=1e-4)


def test_a_session_on_engines_that_do_nothing_gives_what_its_memory_was_filled_with(toy_bundle):
    with cachec.load(toy_bundle) as loaded:
        idle = {name: session_costs.NullEngine(object(), e.signature, e.device) for name, e in loaded.engines.items()}
        session = Session(idle, loaded.programs["default"], loaded.io)
        latents = session.run({"prompt": make_noise(1, (8,))[None]}, make_noise(0, (6, 8))[None])
    np.testing.assert_array_equal(latents, np.zeros((1, 6, 8)))


def test_conditions_come_from_the_text_alone(work):
    case = cases.open_case(cases.SHAPED, work, quick=True)
    names = case.model.io.conditions
    alone, both = (case.model.encode(texts, case.settings, names) for texts in (["a"], ["b", "a"]))
    for name in names:
        np.testing.assert_array_equal(alone[name][0], both[name][1])
    assert not np.array_equal(both["pooled_projections"][0], both["pooled_projections"][1])


def test_psnr_of_latents_takes_their_range_as_peak(work):
    case = cases.open_case(cases.SHAPED, work, quick=True)
    reference = np.array([0.0, 2.0], np.float32)
    assert case.psnr(reference + np.float32(0.2), reference) == pytest.approx(20.0, abs=1e-4)
    assert case.psnr(reference, reference) == np.inf


def test_parts_have_names_of_their_own_and_come_after_their_bundles():
    names = [part.name for part in speed.all_parts()]
    assert len(set(names)) == len(names)
    assert names[0] == "bundles-tiny-flux-ort"
    assert [part.name for part in speed.choose_parts("pairs", "flux-shaped")] == [
        f"pairs-flux-shaped-{backend}" for backend in ("ort", "aoti", "inductor")
    ]
    assert speed.choose_parts("report", None) == []


def spread(value):
    return {"median": value, "low": value, "high": value}


def pair_part(of_ideal):
    calls = {"calls": {"compute": 1000.0, "forecast": 8.0}, "forecasts": {"5": 8.0}, "outside": 1.0, "share": 0.002,
             "whole": {"compute": 9000.0, "forecast": 100.0, "outside": 50.0}}  # fmt: skip
    names = [f"{cut} cut, {budget}" for cut in ("hidden", "output") for budget in (7, 10)]
    pairs = [{"name": name, "computed": 7, "ideal": 4.0, "ratios": [4.0], "ratio": spread(4.0), "of_ideal": spread(of_ideal)}
             for name in names]  # fmt: skip
    return {"case": "tiny-flux", "backend": "ort", "steps": 28, "pairs": pairs, "calls": dict.fromkeys(names, calls),
            "facts": FACTS, "wall_seconds": 60.0}  # fmt: skip


@pytest.mark.parametrize(("of_ideal", "met"), [(0.98, "yes"), (0.9, "no")])
def test_the_report_says_what_is_met_and_what_has_not_run(tmp_path, of_ideal, met):
    (tmp_path / "pairs-tiny-flux-ort.json").write_text(json.dumps(pair_part(of_ideal)))
    text = speed_report.report(speed.collect(tmp_path, speed.all_parts(), quick=False), {})
    assert f"| measured/ideal, tiny-flux, hidden cut, 7 | ≥ 0.97 | ort {of_ideal:.3f} | {met} |" in text
    assert ("Not met by any back end" in text) == (met == "no")
    assert "| ort, hidden cut, 7 | 1000 | – | 0 | 5: 8 | 0.20 % | – | 1 |" in text
    assert "Parts that have not run: bundles-tiny-flux-ort" in text
    assert "## On a GPU" in text


def test_the_share_of_the_products_stands_beside_the_step_that_has_as_many_threads(tmp_path):
    found = {"pairs": 30, "step_ms": spread(6.0), "products_ms": spread(3.9), "share": spread(0.65)}
    products = {"case": "tiny-flux", "facts": FACTS, "wall_seconds": 1.0,
                "threads": {"1": {**found, "share": spread(0.83)}, "2": found}}  # fmt: skip
    (tmp_path / "products-tiny-flux.json").write_text(json.dumps(products))
    (tmp_path / "pairs-tiny-flux-ort.json").write_text(json.dumps(pair_part(0.98)))
    text = speed_report.report(speed.collect(tmp_path, speed.all_parts(), quick=False), {})
    assert "| ort, hidden cut, 7 | 1000 | 0.65 | 0 | 5: 8 |" in text
    assert "| 1 | 30 | 6.00 | 3.90 | 0.830 |" in text


def row(name, family, seconds, computed, *, beside=(), error=0.0):
    latents = np.linspace(0, 1, 8, dtype=np.float32) + np.float32(error)
    return bench_rows.Row(name, family, None, tuple(range(computed)), beside, seconds=[seconds] * 3, latents={0: latents})


def test_rows_are_compared_with_their_own_uncached_run_and_with_the_peer_on_its_steps(work):
    case = cases.open_case(cases.SHAPED, work, quick=True)
    rows = [row("diffusers", "diffusers", 12.0, case.steps), row("a cache", "diffusers", 6.0, 4, error=0.1)]
    for backend in ("ort", "aoti", "inductor"):
        family = f"cachec {backend}"
        rows.append(row(f"{family}, uncached", family, 6.0, case.steps))
        rows.append(row(f"{family}, on the steps of a cache", family, 2.0, 4, beside=("a cache",), error=0.01))
    entries = {entry["name"]: entry for entry in bench_rows.to_json(case, rows)}
    assert entries["a cache"]["speedup"] == pytest.approx(2.0)
    assert entries["a cache"]["of_ideal"] == pytest.approx(2.0 * 4 / case.steps)
    mine = entries["cachec ort, on the steps of a cache"]
    assert (mine["speedup"], mine["over_diffusers"]) == (pytest.approx(3.0), pytest.approx(6.0))
    assert mine["psnr_db"] == pytest.approx(40.0, abs=1e-3)
    part = {"case": "flux-shaped", "steps": case.steps, "requests": 1, "repeats": 3, "pictures": False,
            "rows": list(entries.values()), "skipped": {}, "facts": FACTS, "wall_seconds": 1.0}  # fmt: skip
    text = speed_report.report({"quick": False, "parts": {"rows-flux-shaped": part}, "missing": [], "gpu": None}, {})
    assert "Nothing has run on a GPU" in text
    assert "| a cache | 4 | 6.0000 | 20.0 | 40.0 | 3.00 | 3.00 | 3.00 |" in text
    assert "least × any peer on its own steps, flux-shaped | ≥ 1.3 | ort 3.00, aoti 3.00, inductor 3.00 | yes |" in text


def test_rows_of_all_libraries_take_turns_and_what_skipped_nothing_runs_once(work):
    asked = []

    class Library:
        def __init__(self, *rows):
            self.rows = rows

        def measure(self, what, number, index):
            asked.append((self.rows[number].name, index))

    idle = row("idle", "diffusers", 1.0, 12)
    idle.once = True
    libraries = [Library(row("a", "diffusers", 1.0, 12), idle), Library(row("b", "cachec ort", 1.0, 12))]
    case = cases.open_case(cases.SHAPED, work, quick=True)
    bench_rows.measure_all(case, libraries, bench_rows.time_loop, 2)
    assert asked == [("a", 0), ("b", 0), ("b", 0), ("a", 0)]
    asked.clear()
    bench_rows.measure_all(case, libraries, bench_rows.time_request, 1)
    assert asked == [("a", 0), ("idle", 0), ("b", 0)]


def test_a_report_of_nothing_says_so(tmp_path):
    assert "Nothing has been measured." in speed_report.report(speed.collect(tmp_path, speed.all_parts(), quick=True), {})
