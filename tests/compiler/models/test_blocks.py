"""Other blocks in a transformer's body: the same numbers from the graphs as from the modules, for every family."""

import pytest
import torch

from cachec.compiler.graphs.capture import joined
from cachec.compiler.graphs.prepare import engine, with_blocks
from cachec.compiler.graphs.weights import Values
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.blocks import CACHED, BlockPredictor, KeepingTransformer, PredictingTransformer
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import COMPUTE, FEATURE, FORECAST, PROLOGUE, VELOCITY
from tests.families import FAMILIES, randomise
from tests.family_settings import SOME, settings_for

RUN = [  # of each kind of blocks one
    pytest.param(family, id=family.name, marks=() if family.name == "flux" else pytest.mark.slow)
    for family in FAMILIES
    if family.name in {"flux", *SOME, "hunyuan-video"}
]
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=RUN)
def case(request, saved_family):
    family = request.param
    directory = saved_family(family.name)
    model = load_model(find_model(str(directory)))
    for name, stand_in in family.stand_ins(directory).items():
        setattr(model.pipeline, name, stand_in)
    return model, settings_for(family)


@torch.no_grad()
def test_graphs_give_what_the_modules_give(case):
    model, settings = case
    transformer, body = model.transformer, model.body
    predictor = randomise(BlockPredictor(transformer, body), seed=3)
    constants, inputs = model.constants(settings), joined(model.example_inputs(settings), model.io)
    wanted, tokens = KeepingTransformer(model.capturable(transformer), body)(**inputs, **constants)
    assert tokens.shape[-1] == body.width
    predicting = PredictingTransformer(transformer, body, predictor, model.capturable)
    forecast = predicting(**inputs, **constants, **{CACHED: tokens})
    assert not torch.allclose(forecast, wanted)

    graphs = with_blocks(model, settings, predictor)
    apart = {**model.example_inputs(settings), CACHED: tokens}
    split = {name: _run(Values().module(module), apart) for name, module in graphs.modules.items()}
    state = apart[model.io.latents].shape[1]  # the output may be of a reference or a variance, too
    _close(split[COMPUTE][VELOCITY], wanted[:, :state])
    _close(split[COMPUTE][FEATURE], tokens)
    _close(split[FORECAST][VELOCITY], forecast[:, :state])


@pytest.mark.parametrize("case", RUN[:1], indirect=True)
def test_modulations_of_the_predictor_are_in_the_prologue(case):
    model, settings = case
    predictor = BlockPredictor(model.transformer, model.body)
    built = engine(with_blocks(model, settings, predictor), model.io)
    forecast = built.modules[FORECAST]
    assert {CACHED, model.io.latents} <= set(placeholders(forecast))
    assert FEATURE not in outputs(forecast)
    assert any(name.startswith("forecast_step_values") for name in outputs(built.modules[PROLOGUE]))


def _run(module, known):
    return module(**{name: known[name] for name in placeholders(module)})


def _close(got, wanted):
    assert got.shape == wanted.shape
    assert ((got - wanted).abs().max() / wanted.abs().max()).item() < TOLERANCE
