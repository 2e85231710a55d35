"""Blocks that forecast, with two branches of guidance and samplers of all kinds, beside the evaluator that knows no plans."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_guided_toy import BATCH, SAMPLERS, sampling_of
from toy import TOKENS, WIDTH, example_inputs
from toy_bundle import IO, STEPS
from toy_model import SETTINGS, ToyModel

from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.graphs.export import plan_engines
from cachec.compiler.graphs.prepare import engine, prepare, with_blocks
from cachec.compiler.models.blocks import BlockPredictor
from cachec.compiler.tables.lower import lower_predictor, lower_uncached
from cachec.compiler.tables.schedule import Schedule
from cachec.engines.eager import EagerEngine
from cachec.engines.torch_device import TorchDevice
from cachec.runtime.device import DeviceName
from cachec.runtime.program import ProgramKey, hash_sigmas
from cachec.runtime.session import Session

SCHEDULE = Schedule(STEPS, (0, 2, 3, 6))


@pytest.fixture(scope="module")
def graphs():
    model = ToyModel()
    torch.manual_seed(5)
    predictor = BlockPredictor(model.transformer, model.body).requires_grad_(False)
    return prepare(model, SETTINGS), with_blocks(model, SETTINGS, predictor)


@pytest.mark.parametrize("rule", [None, "plain", "renormalised"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sessions_play_what_the_evaluator_plays(name, rule, graphs):
    (split, inlined), sampling, io = graphs, sampling_of(name), replace(IO, guidance=rule)
    rng = np.random.default_rng(0)
    prompt, negative, noise = (
        rng.standard_normal((BATCH, *shape)).astype(np.float32) for shape in ((WIDTH,), (WIDTH,), (TOKENS, WIDTH))
    )
    conditions = {"prompt": prompt}
    if rule is not None:
        conditions |= {"negative_prompt": negative, "guidance_scale": np.array([3, 1, 5], np.float32)}
    key = ProgramKey(STEPS, hash_sigmas(sampling.sigmas), {}, guided=rule is not None)
    program = lower_predictor(SCHEDULE, 1, feeds_back=False, key=key, sampling=sampling)
    built, device = engine(inlined, io, carries=sampling.rows is not None), TorchDevice(DeviceName.parse("cpu"))
    plans = plan_engines(built, example_inputs(), IO.latents, STEPS)
    engines = {plan.name: EagerEngine(built.modules[plan.name], plan.signature, device) for plan in plans}
    evaluator, session = GraphEvaluator(split, io, inlined), Session(engines, program, io, batch=BATCH)
    wanted = evaluator.play(program, noise, conditions)
    for _ in range(2):  # nothing is left behind
        np.testing.assert_allclose(session.run(conditions, noise), wanted, atol=2e-5 * np.abs(wanted).max())
    assert np.abs(evaluator.play(lower_uncached(key, sampling), noise, conditions) - wanted).max() > 1e-3
