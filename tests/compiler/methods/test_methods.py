"""Every method against the paper's recursion written out, and the algebra of composing and lowering."""

import math
from collections import deque

import numpy as np
import pytest
import torch

from cachec.compiler.graphs.capture import capture_predictor
from cachec.compiler.methods import METHODS, get_method
from cachec.compiler.methods.base import Method, Parameters
from cachec.compiler.methods.kan import KanLinear
from cachec.compiler.methods.lesa import STAGE_BOUNDS, WINDOWS, Lesa, LesaPredictor
from cachec.compiler.methods.reuse import Reuse
from cachec.compiler.methods.taylor import Taylor
from cachec.compiler.tables.coefficients import compose
from cachec.compiler.tables.lower import lower_predictor, lower_table
from cachec.compiler.tables.schedule import interval_schedule
from cachec.passes import DropAsserts, FoldStatic, Graphs
from cachec.passes.base import outputs
from cachec.runtime.abi import FEATURE, FORECAST, VELOCITY
from cachec.runtime.errors import InputError, PredictorError
from cachec.runtime.program import ProgramKey, hash_sigmas

SHAPE = (2, 3, 4)  # [B, L, D]


def sigmas_of(num_steps, shift=3.16):
    t = np.linspace(1, 0, num_steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).astype(np.float32)


def random_lesa(num_steps, seed=0):
    """A LESA predictor with weights far from its start, so that every term of it matters."""
    torch.manual_seed(seed)
    predictor = LesaPredictor(num_steps)
    with torch.no_grad():
        for kan in predictor.kans:
            kan[-1].base_weight.normal_(0, 0.5)
        for mix in predictor.mixes:
            mix.weight.normal_(0, 0.3)
            mix.bias.normal_(0, 0.3)
    return predictor.eval()


def rows_of(method: Method, predictor, num_steps, schedule):
    """Rows of the folded predictor, through the real passes."""
    graph = capture_predictor(predictor, method.window, torch.randn(SHAPE), num_steps)
    result = next(iter(reversed(graph.graph.nodes)))
    result.args = ({VELOCITY: outputs(graph)[FEATURE], FEATURE: outputs(graph)[FEATURE]},)
    graph.recompile()
    histories = {s: schedule.history(s, method.window, feeds_back=method.feeds_back) for s in schedule.forecast}
    graphs = DropAsserts().run(Graphs({FORECAST: graph})).graphs
    folded = FoldStatic(torch.from_numpy(sigmas_of(num_steps)), histories).run(graphs)
    return folded.graphs.rows.coefficients.numpy(), folded.graphs.rows.bias.numpy()


def table_of(method, predictor, num_steps, schedule):
    rows, bias = rows_of(method, predictor, num_steps, schedule)
    return compose(rows, bias, schedule, feeds_back=method.feeds_back)


def forecast(table, features):
    """All forecasts of a table on given computed features, by step."""
    stacked = np.stack([features[step] for step in table.schedule.compute])
    return {s: np.tensordot(table.coefficients[s], stacked, 1) + table.bias[s] for s in table.schedule.forecast}


def taylorseer(features, schedule, order, warmup=3):
    """TaylorSeer as released: a table of differences that each computed step updates (arXiv 2503.06923)."""
    result, differences, previous = {}, {}, None
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            updated = {0: features[step]}
            for i in range(order):
                if differences.get(i) is None or not step > warmup - 2:
                    break
                updated[i + 1] = (updated[i] - differences[i]) / (step - previous)
            differences, previous = updated, step
        else:
            k = step - previous
            result[step] = sum(d * k**i / math.factorial(i) for i, d in differences.items())
    return result


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
@pytest.mark.parametrize(("num_steps", "interval"), [(50, 7), (28, 4), (10, 2)])
def test_taylor_equals_the_released_recursion(order, num_steps, interval):
    schedule = interval_schedule(num_steps, interval)
    rng = np.random.default_rng(0)
    features = {step: rng.standard_normal(SHAPE) for step in schedule.compute}
    got = forecast(table_of(Taylor(order), Taylor(order).predictor(None), num_steps, schedule), features)
    for step, expected in taylorseer(features, schedule, order).items():
        np.testing.assert_allclose(got[step], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_taylor_is_exact_on_lines(order):
    schedule = interval_schedule(50, 6)
    slope = np.random.default_rng(1).standard_normal((2, *SHAPE))
    features = {step: slope[0] + step * slope[1] for step in range(50)}
    got = forecast(table_of(Taylor(order), Taylor(order).predictor(None), 50, schedule), features)
    for step, value in got.items():
        np.testing.assert_allclose(value, features[step], rtol=1e-4, atol=1e-3)


def test_reuse_repeats_the_last_computed_feature():
    schedule = interval_schedule(20, 4)
    features = {step: np.full(SHAPE, float(step)) for step in schedule.compute}
    for step, value in forecast(table_of(Reuse(), Reuse().predictor(None), 20, schedule), features).items():
        assert (value == max(s for s in schedule.compute if s < step)).all()


def lesa_step_by_step(predictor, features, schedule, sigmas):
    """LESA as published: a deque of the last eight features, forecasts among them (arXiv 2602.20497)."""
    history, result = deque(maxlen=8), {}
    t = torch.from_numpy(sigmas)
    for step in range(schedule.num_steps):
        if step in schedule.compute:
            history.append(features[step])
            continue
        expert = sum(float(t[step]) <= bound for bound in STAGE_BOUNDS)
        with torch.no_grad():
            alpha = predictor.kans[expert](t[step] - t).item()
        entries = list(reversed(history))
        entries += [entries[-1]] * (WINDOWS[expert] - len(entries))
        mix = predictor.mixes[expert]
        z = sum(w * f for w, f in zip(mix.weight[0].tolist(), entries, strict=False)) + mix.bias.item()
        result[step] = entries[0] + alpha * z
        history.append(result[step])
    return result


@pytest.mark.parametrize("num_steps", [50, 28])
def test_composed_lesa_equals_the_step_by_step_recursion(num_steps):
    schedule = Lesa().interval(num_steps, 7)
    predictor = random_lesa(num_steps)
    rng = np.random.default_rng(2)
    features = {step: rng.standard_normal(SHAPE) for step in schedule.compute}
    got = forecast(table_of(Lesa(), predictor, num_steps, schedule), features)
    expected = lesa_step_by_step(predictor, features, schedule, sigmas_of(num_steps))
    scale = max(np.abs(value).max() for value in expected.values())
    for step, value in expected.items():
        np.testing.assert_allclose(got[step], value, atol=1e-5 * scale)


def test_lesa_bias_reaches_the_composed_table():
    schedule = Lesa().interval(50, 7)
    table = table_of(Lesa(), random_lesa(50), 50, schedule)
    assert np.abs(table.bias[list(schedule.forecast)]).max() > 1e-3


def cox_de_boor(x, knots, order):
    """Spline bases by the textbook recursion, which efficient-kan uses."""
    bases = [((x >= a) & (x < b)).double() for a, b in zip(knots[:-1], knots[1:], strict=True)]
    for k in range(1, order + 1):
        bases = [
            (x - knots[i]) / (knots[i + k] - knots[i]) * bases[i]
            + (knots[i + k + 1] - x) / (knots[i + k + 1] - knots[i + 1]) * bases[i + 1]
            for i in range(len(bases) - 1)
        ]
    return torch.stack(bases, dim=-1)


def test_kan_bases_equal_cox_de_boor():
    layer = KanLinear(4, 2)
    x = torch.linspace(-2.99, 2.99, 400).reshape(100, 4)
    knots = [-3 + 1.2 * i for i in range(-3, 9)]
    expected = cox_de_boor(x.double(), knots, 3)
    torch.testing.assert_close(layer.bases(x).double(), expected, atol=1e-5, rtol=0)


def test_an_untrained_lesa_is_nearly_plain_reuse():
    torch.manual_seed(0)
    rows, _ = rows_of(Lesa(), LesaPredictor(50).eval(), 50, Lesa().interval(50, 7))
    newest = rows[list(Lesa().interval(50, 7).forecast), 0]
    assert np.abs(newest - 1).max() < 0.1


@pytest.mark.parametrize("name", METHODS)
def test_methods_name_themselves_and_cite_a_source(name):
    method = get_method(name)
    assert method.name == name
    assert "arXiv" in (__import__(method.__module__, fromlist=["x"]).__doc__ or "")


@pytest.mark.parametrize(("options", "message"), [({"ordre": "1"}, "Did you mean 'order'"), ({"order": "two"}, "whole")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Taylor.with_options(options)


def test_order_out_of_range_is_refused():
    with pytest.raises(InputError, match="order is 99"):
        Taylor(99)


def test_lesa_without_parameters_or_with_foreign_ones_is_refused():
    with pytest.raises(PredictorError, match="trained predictor"):
        Lesa().predictor(None)
    with pytest.raises(PredictorError, match="does not hold a LESA predictor"):
        Lesa().predictor(Parameters({"x": torch.zeros(1)}, {"steps": "50"}, "somewhere"))


def key_of(num_steps, sigmas):
    return ProgramKey(num_steps, hash_sigmas(sigmas), {"height": 64})


@pytest.mark.parametrize("order", [0, 1, 2])
def test_slots_are_reused_when_a_method_looks_back_a_fixed_number_of_features(order):
    schedule = interval_schedule(50, 7)
    sigmas = sigmas_of(50)
    table = table_of(Taylor(order), Taylor(order).predictor(None), 50, schedule)
    program = lower_table(table, key_of(50, sigmas), sigmas, sigmas[:-1])
    assert program.capacity == order + 1
    assert program.compute_steps == schedule.compute


@pytest.mark.parametrize("method", [Taylor(2), Lesa()])
def test_lowered_program_computes_what_the_table_says(method):
    schedule = method.interval(50, 7)
    predictor = random_lesa(50) if method.name == "lesa" else method.predictor(None)
    table, sigmas = table_of(method, predictor, 50, schedule), sigmas_of(50)
    program = lower_table(table, key_of(50, sigmas), sigmas, sigmas[:-1])
    rng = np.random.default_rng(3)
    features = {step: rng.standard_normal(SHAPE) for step in schedule.compute}
    expected, ring = forecast(table, features), np.full((program.capacity, *SHAPE), np.nan)
    for instruction in program.instructions:
        for slot in instruction.writes.values():
            ring[slot] = features[instruction.steps[0]]
        for step in instruction.rows:
            bound = len(instruction.reads["feature"])
            got = np.tensordot(program.coefficients[step, 0, :bound], ring[:bound], 1) + program.bias[step]
            np.testing.assert_allclose(got, expected[step], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [Reuse(), Taylor(2), Lesa()])
def test_predictor_programs_read_the_right_features_and_never_overwrite_one_in_use(method):
    schedule = method.interval(50, 7)
    sigmas = sigmas_of(50)
    program = lower_predictor(
        schedule,
        method.window,
        feeds_back=method.feeds_back,
        key=key_of(50, sigmas),
        sigmas=sigmas,
        timesteps=sigmas[:-1],
    )
    holds = {}
    for instruction in program.instructions:
        (step,), sources = instruction.steps, instruction.reads.get("feature", ())
        if not instruction.computes:
            assert tuple(holds[slot] for slot in sources) == schedule.history(step, method.window, feeds_back=method.feeds_back)
        for slot in instruction.writes.values():
            assert slot not in sources
            holds[slot] = step
    assert program.capacity <= method.window + 1
