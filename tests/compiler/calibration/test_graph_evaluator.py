"""Programs in closed loop against the loop written out, and answers at any told time."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import example_inputs
from toy_bundle import IO as TOY_IO
from toy_bundle import toy_program
from toy_calibration import IO, make_calibration, make_evaluator

from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.coefficients import AdvanceTable, ForecastTable
from cachec.compiler.tables.lower import lower_predictor
from cachec.compiler.tables.schedule import Schedule
from cachec.passes import Graphs
from cachec.runtime.abi import COMPUTE, FEATURE, FORECAST, HISTORY_STEPS, SIGMAS, STEP, VELOCITY, history_name
from cachec.runtime.errors import EngineError, InputError
from cachec.runtime.program import Program, ProgramKey, hash_sigmas

STEPS = 12
SCHEDULE = Schedule(STEPS, (0, 2, 5, 8))


@pytest.fixture(scope="module")
def calibration():
    return make_calibration(num_steps=STEPS)


def hidden_table(window=2):
    generator = np.random.default_rng(0)
    rows = np.zeros((STEPS, 4))
    for step in SCHEDULE.forecast:
        known = sum(s < step for s in SCHEDULE.compute)
        rows[step, max(0, known - window) : known] = generator.standard_normal(min(window, known)) / 2
    return ForecastTable(SCHEDULE, rows[:, None], np.where(rows.any(axis=1), 0.01, 0.0))


def output_table():
    rows = np.tril(np.random.default_rng(0).standard_normal((4, 4))) / 4
    return AdvanceTable(SCHEDULE, rows, np.array([0.9, 0.7, 0.4, 0.1]))


def test_a_told_time_is_one_number_or_one_each(calibration):
    evaluator, x, conditions = calibration.evaluator, calibration.noise(), calibration.all_conditions()
    times = np.linspace(0.2, 0.9, len(x))
    velocity, feature = evaluator.evaluate(x, times, conditions)
    for row, t in enumerate(times):
        one = {name: value[row : row + 1] for name, value in conditions.items()}
        alone, its_feature = evaluator.evaluate(x[row : row + 1], t, one)
        np.testing.assert_allclose(velocity[row], alone[0], rtol=1e-12)
        np.testing.assert_allclose(feature[row], its_feature[0], rtol=1e-12)
    np.testing.assert_allclose(evaluator.tail(feature, times, conditions), velocity, rtol=1e-12)


def test_many_samples_are_run_piece_by_piece(toy_split):
    x, t, conditions = (value.numpy() for value in example_inputs(batch=5).values())
    whole, pieces = GraphEvaluator(toy_split, TOY_IO), GraphEvaluator(toy_split, TOY_IO, max_batch=2)
    for told in (t, 0.5):
        velocity, feature = whole.evaluate(x, told, {"prompt": conditions})
        for got, wanted in zip(pieces.evaluate(x, told, {"prompt": conditions}), (velocity, feature), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)
        np.testing.assert_allclose(pieces.tail(feature, told, {"prompt": conditions}), velocity, atol=1e-6)
    played = [one.play(toy_program(), x, {"prompt": conditions}) for one in (whole, pieces)]
    np.testing.assert_allclose(*played, atol=1e-5)


def test_what_runs_out_of_memory_says_what_it_was(toy_split, monkeypatch):
    evaluator = GraphEvaluator(toy_split, TOY_IO, max_batch=2)

    def without_memory(*_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(evaluator, "_evaluate", without_memory)
    x, t, prompt = example_inputs(batch=3).values()
    with pytest.raises(EngineError, match="no memory for 2 samples of the model in float32 on cpu: tried to allocate 20 GiB"):
        evaluator.evaluate(x.numpy(), t.numpy(), {"prompt": prompt.numpy()})
    with pytest.raises(EngineError, match="no memory for 3 samples of the model with gradients, in float32 on cpu"):
        evaluator.evaluate_with_gradients(x, t, {"prompt": prompt})


def test_the_hidden_cut_is_played_with_the_tail_at_its_steps(calibration):
    table, sampling, evaluator = hidden_table(), calibration.sampling, calibration.evaluator
    x, conditions, features = calibration.noise(), calibration.all_conditions(), []
    for step, t in enumerate(sampling.timesteps):
        if step in SCHEDULE.compute:
            velocity, feature = evaluator.evaluate(x, t, conditions)
            features.append(feature)
        else:
            forecast = np.tensordot(table.rows[step, : len(features)], np.stack(features), 1) + table.bias[step]
            velocity = evaluator.tail(forecast, t, conditions)
        x = x + float(sampling.sigmas[step + 1] - sampling.sigmas[step]) * velocity
    program = calibration.program(table)
    assert program.capacity == 2  # slots are used again
    np.testing.assert_allclose(calibration.play(program), x, rtol=1e-5, atol=1e-6)


def output_run(calibration, rows, told):
    noise, velocities = calibration.noise(), []
    x = noise
    for row, t in zip(rows, told, strict=True):
        velocities.append(calibration.evaluator.evaluate(x, float(t), calibration.all_conditions())[0])
        x = noise + np.tensordot(row[: len(velocities)], np.stack(velocities), 1)
    return x


def test_the_output_cut_moves_from_the_noise_by_its_rows(calibration):
    table = output_table()
    expected = output_run(calibration, table.coefficients, table.timesteps)
    np.testing.assert_allclose(calibration.play(calibration.program(table)), expected, rtol=1e-5, atol=1e-6)


def test_other_rows_and_told_times_are_played_without_making_a_program(calibration, monkeypatch):
    program, rows = calibration.program(output_table()), np.tril(np.random.default_rng(1).standard_normal((4, 4))) / 4
    coefficients, told = program.coefficients.astype(np.float64), np.linspace(1, 0.1, STEPS)
    coefficients[list(SCHEDULE.compute), 0] = rows
    monkeypatch.setattr(Program, "__post_init__", None)  # would fail
    evaluator, conditions = calibration.evaluator, calibration.all_conditions()
    got = evaluator.play(program, calibration.noise(), conditions, coefficients=coefficients, timesteps=told)
    expected = output_run(calibration, rows, told[list(SCHEDULE.compute)])
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10)


class Inlined(torch.nn.Module):
    """The toy's tail behind Taylor's predictor of order 1, as a graph that is not folded."""

    def __init__(self, tail):
        super().__init__()
        self.tail, self.predictor = tail, Taylor(1).predictor(None)

    def forward(self, feature_0, feature_1, history_steps, sigmas, step, prompt):
        feature = self.predictor([feature_0, feature_1], history_steps, sigmas, step)
        return {VELOCITY: self.tail(feature, prompt)[VELOCITY], FEATURE: feature}


def test_a_predictor_inside_its_engine_is_played_as_its_folded_table(calibration):
    names = (history_name(0), history_name(1), HISTORY_STEPS, SIGMAS, STEP, "prompt")
    assert names == tuple(Inlined.forward.__code__.co_varnames[1:7])
    plain = make_evaluator()
    inlined = torch.fx.symbolic_trace(Inlined(plain._behind))
    split = Graphs({COMPUTE: plain._compute, FORECAST: plain._behind})
    sampling, method = calibration.sampling, Taylor(1)
    key = ProgramKey(STEPS, hash_sigmas(sampling.sigmas), {})
    program = lower_predictor(SCHEDULE, method.window, feeds_back=False, key=key, sampling=sampling)
    own = GraphEvaluator(split, IO, Graphs({FORECAST: inlined}))
    folded = calibration.play(calibration.program(method.table(SCHEDULE, calibration.sigmas, None)))
    np.testing.assert_allclose(replace(calibration, evaluator=own).play(program), folded, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="calls a predictor inside its engine, and this evaluator was given none"):
        calibration.play(program)


def test_gradients_are_those_of_the_answers(calibration):
    evaluator = calibration.evaluator
    x, t = (
        torch.from_numpy(calibration.noise()[:1]).requires_grad_(),
        torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
    )
    conditions = {name: torch.from_numpy(value[:1]) for name, value in calibration.all_conditions().items()}
    assert torch.autograd.gradcheck(lambda x, t: evaluator.evaluate_with_gradients(x, t, conditions), (x, t))
