import numpy as np
import pytest
from toy_bundle import SIGMAS, STEPS

from cachec.compiler.evaluation.error_by_step import at_noise_level, measure_errors, position, trace
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.lower import lower_advance
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.noise import make_noise
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import Session


@pytest.fixture
def run():
    return {"prompt": np.ones((1, 8), np.float32)}, make_noise(0, (6, 8))[None]


def test_a_trace_ends_where_the_run_does(loaded, run):
    session = loaded.session()
    points = list(trace(session, *run))
    ends = [instruction.steps[-1] + 1 for instruction in session.program.instructions]
    assert [sigma for sigma, _ in points] == pytest.approx(SIGMAS[ends].tolist())
    np.testing.assert_array_equal(points[-1][1], session.run(*run))


def test_the_uncached_run_has_no_error_and_forecasts_have(loaded, run):
    sessions = {"same": loaded.session(level=UNCACHED), "default": loaded.session()}
    errors = measure_errors(loaded.session(level=UNCACHED), sessions, [run, run])
    assert max(errors["same"].rel_l2) < 1e-6
    assert errors["same"].steps == pytest.approx(range(1, STEPS + 1))
    assert errors["default"].steps[-1] == pytest.approx(STEPS)
    assert errors["default"].rel_l2[-1] > 1e-4


def test_output_cut_has_points_at_computed_steps(loaded, run):
    """Rows that repeat every velocity over its gap are Euler with longer steps: on one gap of one step, no error at all."""
    program = loaded.programs["default"]
    schedule = Schedule(STEPS, (0, 1, 5))
    ends = SIGMAS[[1, 5, STEPS]]
    moves = np.diff(ends, prepend=SIGMAS[0])
    table = AdvanceTable(schedule, np.tril(np.broadcast_to(moves, (3, 3))))
    output = Session(loaded.engines, lower_advance(table, program.key, Sampling(SIGMAS, SIGMAS[:-1])), loaded.io)
    errors = measure_errors(loaded.session(level=UNCACHED), {"output": output}, [run])
    assert errors["output"].steps == pytest.approx((1, 5, STEPS))
    assert errors["output"].rel_l2[0] < 1e-6 < errors["output"].rel_l2[1]


def test_places_and_latents_between_two_steps():
    assert position(SIGMAS, 1.0) == 0
    assert position(SIGMAS, 0.0) == STEPS
    assert position(SIGMAS, 0.55) == pytest.approx(4.5, abs=1e-5)
    latents = np.arange(STEPS + 1, dtype=np.float64)[:, None]
    for sigma in (1.0, 0.55, 0.31, 0.0):
        assert at_noise_level(latents, SIGMAS, sigma)[0] == pytest.approx(position(SIGMAS, sigma), abs=1e-5)
