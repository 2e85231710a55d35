"""A flow map, which is told a second time: both graphs read it, its embedding is made ahead, and Programs tell it."""

import numpy as np
import pytest
import torch
from torch import nn
from toy import TOKENS, WIDTH, ToyDiT
from toy_bundle import IO, KEY, SIGMAS, STEPS
from toy_model import SETTINGS, ToyModel, ToyPipeline

from cachec.compiler.calibration.engine_evaluator import EngineEvaluator
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import run_uncached
from cachec.compiler.graphs.build_engines import LooseSources
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import engine, linear, prepare, with_blocks
from cachec.compiler.models.blocks import CACHED, BlockPredictor, KeepingTransformer, PredictingTransformer
from cachec.compiler.tables.lower import lower_predictor, lower_uncached
from cachec.compiler.tables.sampling import Sampling
from cachec.compiler.tables.schedule import Schedule
from cachec.engines import get_builder
from cachec.passes.base import placeholders
from cachec.runtime.abi import COMPUTE, FORECAST, PROLOGUE, TARGET_TIMESTEP
from cachec.runtime.binding import Binding
from cachec.runtime.engine import HOST, LoadOptions
from cachec.runtime.noise import make_noise

SCHEDULE = Schedule(STEPS, (0, 3, 6, 8))
SAMPLING = Sampling(SIGMAS, SIGMAS[:-1], targets=SIGMAS[1:])


class FlowMap(ToyDiT):
    """Tokens of both times are averaged, as DisCa's base has them."""

    def __init__(self):
        super().__init__(head_axis=True)
        self.time_r = nn.Linear(1, WIDTH)

    def forward(self, latents, timestep, target_timestep, prompt):
        second = torch.atanh(torch.tanh(self.time_r(target_timestep[:, None])) * 0.5)
        return super().forward(latents, timestep, prompt + second)


class FlowMapModel(ToyModel):
    def __init__(self):
        super().__init__(pipeline=ToyPipeline(FlowMap().eval()))

    def example_inputs(self, settings, *, batch=2):
        return {**super().example_inputs(settings, batch=batch), TARGET_TIMESTEP: torch.linspace(0.7, 0.2, batch)}


@pytest.fixture(scope="module")
def made():
    model = FlowMapModel()
    torch.manual_seed(3)
    predictor = BlockPredictor(model.transformer, model.body).requires_grad_(False)
    return model, predictor, engine(with_blocks(model, SETTINGS, predictor), IO)


def test_what_depends_on_both_times_is_made_ahead(made):
    graphs = made[2]
    assert {"compute_timesteps", "compute_target_timesteps", "forecast_target_timesteps"} <= set(
        placeholders(graphs.modules[PROLOGUE])
    )
    for name in (COMPUTE, FORECAST):
        assert TARGET_TIMESTEP not in placeholders(graphs.modules[name])


@torch.no_grad()
def test_a_program_tells_both(made, tmp_path):
    model, predictor, graphs = made
    plans = plan_engines(graphs, model.example_inputs(SETTINGS), "latents", STEPS)
    builder = get_builder("eager")
    sources = LooseSources(plans, tmp_path)
    engines = builder.engine.load(builder.build(sources, tmp_path, device=HOST), sources.signatures, LoadOptions(HOST))
    program = lower_predictor(SCHEDULE, 1, feeds_back=False, key=KEY, sampling=SAMPLING)
    np.testing.assert_array_equal(program.target_timesteps, SIGMAS[1:])
    binding = Binding(engines, program, IO, batch=1)
    noise = make_noise(1, (TOKENS, WIDTH))[None]
    prompt = np.random.default_rng(1).standard_normal((1, WIDTH)).astype(np.float32)
    binding.take({"prompt": prompt}, noise)
    binding.prologue.run()
    for operation in binding.operations:
        operation.call.run()
    got = binding.device.download(binding.final)

    keeping = KeepingTransformer(model.transformer, model.body)
    predicting = PredictingTransformer(model.transformer, model.body, predictor, model.capturable)
    x, tokens = torch.from_numpy(noise), None
    for step in range(STEPS):
        told = {"timestep": torch.tensor(SIGMAS[step : step + 1]), TARGET_TIMESTEP: torch.tensor(SIGMAS[step + 1 : step + 2])}
        given = {"latents": x, **told, "prompt": torch.from_numpy(prompt)}
        if step in SCHEDULE.compute:
            velocity, tokens = keeping(**given)
        else:
            velocity = predicting(**given, **{CACHED: tokens})
        x = x + (SIGMAS[step + 1] - SIGMAS[step]).item() * velocity
    np.testing.assert_allclose(got, x.numpy(), rtol=1e-4, atol=1e-5)


def test_evaluators_tell_both(made, tmp_path):
    """Uncached runs on graphs and on engines, as they are played: whoever is asked tells where each step ends."""
    model = made[0]
    split = prepare(model, SETTINGS)
    graphs = engine(linear(split), IO)
    builder, plans = get_builder("eager"), plan_engines(graphs, model.example_inputs(SETTINGS), "latents", STEPS)
    sources = LooseSources(plans, tmp_path)
    engines = builder.engine.load(builder.build(sources, tmp_path, device=HOST), sources.signatures, LoadOptions(HOST))
    noise = make_noise(1, (TOKENS, WIDTH))[None]
    conditions = {"prompt": np.random.default_rng(1).standard_normal((1, WIDTH)).astype(np.float32)}
    evaluators = GraphEvaluator(split, IO), EngineEvaluator(engines, IO)
    wanted = evaluators[0].play(lower_uncached(KEY, SAMPLING), noise, conditions)
    for evaluator in evaluators:
        *_, last = run_uncached(evaluator, SAMPLING, noise, conditions)
        np.testing.assert_allclose(last.latents, wanted, rtol=1e-4, atol=1e-5)
        given = {**conditions, **SAMPLING.told_besides(2, 1)}
        velocity, feature = evaluator.evaluate(noise, SIGMAS[2], given)
        np.testing.assert_allclose(evaluator.tail(feature, SIGMAS[2], given), velocity, rtol=1e-4, atol=1e-5)
        other = evaluator.evaluate(noise, SIGMAS[2], {**conditions, **SAMPLING.told_besides(5, 1)})[0]
        assert np.abs(other - velocity).max() > 1e-3
