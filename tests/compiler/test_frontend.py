"""The front end: what is checked before anything is captured, and what is made of a request."""

import pytest
from toy_model import SETTINGS, ToyModel

from cachec.compiler.calibration.runs import Subject, recording_here
from cachec.compiler.calibration.statistics import record_statistics, save_statistics
from cachec.compiler.calibration.uses import calibration_prompts
from cachec.compiler.frontend import check, evaluator_of, find_calibrations, make_graphs, make_plans, make_programs
from cachec.compiler.methods.parameters import load_predictor
from cachec.compiler.request import make_request
from cachec.runtime.errors import EngineError, InputError, PredictorError
from cachec.runtime.program import UNCACHED

PROMPTS = [f"a circle of size {size}" for size in range(24)]


@pytest.fixture(scope="module")
def model():
    return ToyModel()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def request_of(**given):
    return make_request(ToyModel.spec, **{"steps": SETTINGS.steps, "targets": "eager", **given})


@pytest.fixture(scope="module")
def calibration(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("calibration") / "toy.safetensors"
    evaluator, uses = evaluator_of(model, SETTINGS), calibration_prompts("avatars", PROMPTS)
    subject = Subject.of(model, SETTINGS)
    here = recording_here(subject, evaluator)
    save_statistics(record_statistics(subject, here, uses, reference_steps=0, seed=0, work=None), path)
    return path


def test_what_is_missing_is_known_before_it_is_made(model, prompts, captures):
    nothing = check(model, request_of(method="taylor", budget=3))
    assert (nothing.parameters, nothing.training, nothing.statistics, nothing.prompts) == (None, None, None, None)
    fitted = check(model, request_of(method="gram", budget=3, prompts=prompts))
    assert set(fitted.prompts.prompts) == set(PROMPTS)
    gated = check(model, request_of(method="taylor", budget=3, min_psnr=10.0, prompts=prompts))
    assert set(gated.prompts.uses) == {"measure"}
    trained = check(model, request_of(method="lesa", steps=8, interval=3, prompts=prompts))
    assert trained.trains
    assert set(trained.training.prompts.uses) == {"fit", "stop"}
    assert captures == []


def test_several_lengths_of_texts_are_for_families_that_mask_their_padding(model, captures):
    with pytest.raises(InputError, match="text-tokens are 1, 2, but toy looks at what a text is padded with, or is not known"):
        check(model, request_of(method="taylor", budget=3, text_tokens="2,1"))
    assert captures == []


def test_a_given_calibration_is_read_and_checked(model, calibration, captures):
    assert check(model, request_of(method="gram", budget=3, calibration=calibration)).statistics.origin == str(calibration)
    with pytest.raises(InputError, match="steps is 4, wanted 5"):
        check(model, request_of(method="gram", steps=5, budget=3, calibration=calibration))
    with pytest.raises(InputError, match="no fine reference, which level fine is fitted to"):
        check(model, request_of(method="gram", levels="fine", calibration=calibration))
    assert captures == []


def test_a_given_predictor_is_read_and_checked(toy_predictor, captures):
    wanted, other = {"method": "lesa", "steps": 8, "predictor": toy_predictor}, ToyModel()
    weights = load_predictor(toy_predictor).facts["weights_sha256"]
    found = check(ToyModel(weights=weights), request_of(**wanted, interval=3))
    assert (found.parameters.origin, found.trains) == (str(toy_predictor), False)
    with pytest.raises(PredictorError, match="schedule is 0,1,2,3,5, wanted 0,1,2,3,4,6"):
        check(ToyModel(weights=weights), request_of(**wanted, interval=2))
    with pytest.raises(PredictorError, match="weights_sha256 is"):
        check(other, request_of(**wanted, interval=3))
    assert captures == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "lesa", "interval": 1}, "all 4 steps are computed: there is nothing for lesa to forecast"),
        ({"method": "taylor", "height": 17}, "the toy draws 16 x 24 pixels, not 17 x 24"),
    ],
)
def test_what_cannot_be_compiled_is_refused_before_the_model_is_captured(model, captures, given, message):
    with pytest.raises(InputError, match=message):
        check(model, request_of(**given))
    assert captures == []


def test_a_model_that_is_not_finite_is_refused(captures):
    import torch

    model = ToyModel()
    with torch.no_grad():
        model.transformer.embed.bias.fill_(torch.inf)
    with pytest.raises(EngineError, match="in float32 an example run of the model is not finite, first at"):
        make_graphs(model, request_of(method="taylor", budget=3), None, by_row=False)


@pytest.mark.parametrize(
    ("given", "graphs"),
    [
        ({"method": "taylor", "budget": 3}, {"prologue", "compute", "forecast", "advance"}),
        ({"method": "adams", "budget": 3}, {"prologue", "compute", "advance"}),
        ({"method": "taylor", "budget": 3, "hoist": "none"}, {"compute", "forecast", "advance"}),
    ],
)
def test_graphs_plans_and_programs_of_a_request(model, given, graphs):
    request = request_of(**given)
    made = make_graphs(model, request, None, by_row=False)
    assert {plan.name for plan in make_plans(model, request.settings, made)} == graphs
    programs = make_programs(model, request, {}, None, None)
    assert list(programs.by_level) == [UNCACHED, "default"]
    assert len(programs.by_level["default"].compute_steps) == 3


def test_calibrations_are_made_of_what_was_checked(model, prompts, calibration, tmp_path):
    given = request_of(method="gram", budget=3, calibration=calibration)
    assert find_calibrations(model, request_of(method="taylor"), check(model, request_of(method="taylor")), None) is None
    read = find_calibrations(model, given, check(model, given), None)
    wanted = request_of(method="gram", budget=3, prompts=prompts)
    made = find_calibrations(model, wanted, check(model, wanted), tmp_path / "work")
    assert made.coarse.num_prompts == read.coarse.num_prompts == len(PROMPTS)
    assert "prompts" not in made.facts
