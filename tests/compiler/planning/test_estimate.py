"""Estimates of the toy, against its shapes."""

import pytest
from toy import TOKENS, WIDTH, ToyDiT
from toy_model import ToyModel

from cachec.compiler.calibration.statistics import calibration_cost
from cachec.compiler.calibration.uses import calibration_prompts
from cachec.compiler.graphs.prepare import compute_only, engine
from cachec.compiler.planning.estimate import estimate, in_count, in_flops
from cachec.compiler.planning.gpus import get_gpus


def test_sizes_are_the_toys(found):
    numbers = sum(parameter.numel() for parameter in ToyDiT().parameters())
    tail = sum(
        parameter.numel() for layer in ("out", "norm_out", "time") for parameter in getattr(ToyDiT(), layer).parameters()
    )
    tail += sum(parameter.numel() for parameter in ToyDiT().blocks[0].modulation.parameters())
    assert (found.total, found.parameters["tail"]) == (numbers, tail)
    assert found.feature == found.velocity == TOKENS * WIDTH * 4
    assert found.slots("hidden") == found.slots("output") == 3 * 2 * found.feature
    usual = len(calibration_prompts(ToyModel.spec.prompts, None).prompts)
    assert found.calibration == calibration_cost((TOKENS, WIDTH), (TOKENS, WIDTH), found.settings, usual, 0)
    assert found.weights >= 4 * numbers
    assert found.needed == found.weights + found.slots("hidden") + 3 * found.activations + found.step_values


def test_a_request_is_its_computed_steps_and_on_the_hidden_cut_its_forecasts(found, gpu):
    assert 0 < found.forecast < found.computed / 3
    assert found.ratio("output") == 4
    assert found.run_flops("hidden") - found.run_flops("output") == 3 * 6 * found.forecast
    assert found.on(gpu)["step"] == 3 * found.computed / 1e9
    assert found.on(gpu)["all_computed"] == pytest.approx(8 * found.on(gpu)["step"])


def test_without_a_forecast_graph_the_rest_is_as_it_was(found, toy_split):
    plain = compute_only(toy_split)
    other = estimate(plain, engine(plain, ToyModel.io), found.spec, found.settings, budget=2, batch=3)
    assert (other.total, other.computed, other.forecast, other.parameters["tail"]) == (found.total, found.computed, 0, 0)


def test_json_has_every_gpu_that_is_asked_for(found):
    content = found.to_json(get_gpus(None))
    assert content["floor"].keys() == {gpu.name for gpu in get_gpus(None)}
    assert content["cuts"]["output"]["ratio_of_flops"] == 4


def test_numbers_are_written_with_their_units():
    assert in_flops(74.4e12) == "74.40 TFLOP"
    assert (in_count(11_901_408_320), in_count(2_400_000)) == ("11.90 billion", "2.40 million")
