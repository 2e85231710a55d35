"""Built engines of the toy bundle against its graphs."""

from dataclasses import replace

import numpy as np
import pytest
from toy import example_inputs
from toy_bundle import IO, KEY, SIGMAS, STEPS, output_table

import cachec
from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import compute_only, engine
from cachec.compiler.tables.lower import lower_advance
from cachec.compiler.tables.sampling import Sampling
from cachec.engines.eager import EagerEngine
from cachec.engines.torch_device import TorchDevice
from cachec.runtime.abi import BATCH, MAX_BATCH
from cachec.runtime.engine import HOST
from cachec.runtime.errors import InputError
from cachec.runtime.program import UNCACHED
from cachec.runtime.session import Session


@pytest.fixture(scope="module")
def loaded(toy_bundle):
    with cachec.load(toy_bundle) as bundle:
        yield bundle


@pytest.fixture(scope="module")
def evaluators(loaded, toy_split):
    return EngineEvaluator(loaded.engines, loaded.io), GraphEvaluator(toy_split, loaded.io)


@pytest.fixture
def given(loaded):
    generator = np.random.default_rng(0)
    shape = loaded.session().latent_shape[1:]
    x, prompt = generator.standard_normal((3, *shape)), generator.standard_normal((3, shape[-1]))
    return x.astype(np.float32), {"prompt": prompt.astype(np.float32)}


def test_an_opened_bundle_says_what_its_engines_compute_in_and_take(loaded):
    target = replace(loaded.target, sizes={BATCH: (1, 1, 3)})
    evaluator = EngineEvaluator.of(replace(loaded, target=target))
    assert (evaluator.device, evaluator.precision, evaluator.max_batch) == ("cpu", "float32", 3)
    assert EngineEvaluator.of(replace(loaded, target=replace(target, sizes={}))).max_batch == MAX_BATCH


def test_a_bundle_that_cannot_tell_what_the_model_does_is_refused(loaded):
    uncached = loaded.programs[UNCACHED]
    fixed = replace(loaded, programs={UNCACHED: replace(uncached, key=replace(uncached.key, batch=2))})
    with pytest.raises(InputError, match="takes batches of 2 only: compile one without --batch"):
        EngineEvaluator.of(fixed)
    finer = replace(loaded, target=replace(loaded.target, precision="float64"))
    with pytest.raises(InputError, match="stores features in float32, which rounds them: compile one without --slots"):
        EngineEvaluator.of(finer)


@pytest.mark.parametrize("t", [0.37, np.array([0.9, 0.2, 0.9])], ids=["one for all", "one each"])
def test_engines_answer_as_the_graphs_do(evaluators, given, t):
    x, conditions = given
    built, graphs = evaluators
    (velocity, feature), (expected, its_feature) = (one.evaluate(x, t, conditions) for one in evaluators)
    np.testing.assert_allclose(velocity, expected, atol=1e-5)
    np.testing.assert_allclose(feature, its_feature, atol=1e-5)
    np.testing.assert_allclose(built.tail(feature, t, conditions), graphs.tail(its_feature, t, conditions), atol=1e-5)


def test_programs_are_played_as_on_the_graphs(loaded, evaluators, given):
    x, conditions = given
    for program in loaded.programs.values():
        built, graphs = (one.play(program, x, conditions) for one in evaluators)
        np.testing.assert_allclose(built, graphs, atol=1e-4)


def test_other_numbers_are_played_without_binding_anew_and_forgotten_behind_them(loaded, evaluators, given, monkeypatch):
    x, conditions = given
    built, graphs = evaluators
    program = loaded.programs[loaded.default_level]
    own = built.play(program, x, conditions)
    monkeypatch.setattr(Session, "__init__", None)  # would fail
    numbers = {"coefficients": 0.5 * program.coefficients, "timesteps": 0.9 * program.timesteps}
    got = built.play(program, x, conditions, **numbers)
    np.testing.assert_allclose(got, graphs.play(program, x, conditions, **numbers), atol=1e-4)
    assert np.abs(got - own).max() > 1e-3
    np.testing.assert_array_equal(built.play(program, x, conditions), own)


def test_engines_of_the_output_cut_answer_too_but_have_no_tail(toy_split, evaluators, given):
    (x, conditions), (_, graphs) = given, evaluators
    prepared = engine(compute_only(toy_split), IO, hoist="none")
    plans = plan_engines(prepared, example_inputs(), "latents", STEPS)
    engines = {plan.name: EagerEngine(prepared.modules[plan.name], plan.signature, TorchDevice(HOST)) for plan in plans}
    built = EngineEvaluator(engines, graphs._io)
    for got, expected in zip(*(one.evaluate(x, 0.4, conditions) for one in (built, graphs)), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    program = lower_advance(output_table(), KEY, Sampling(SIGMAS, SIGMAS[:-1]))
    expected = graphs.play(program, x, conditions)
    np.testing.assert_allclose(built.play(program, x, conditions), expected, atol=1e-4)
    with pytest.raises(InputError, match="these engines have no tail"):
        built.tail(x, 0.5, conditions)
