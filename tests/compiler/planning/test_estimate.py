"""Estimates of the toy, against its shapes."""

from dataclasses import replace

import pytest
from toy import TOKENS, WIDTH, ToyDiT
from toy_model import SETTINGS, ToyModel

from cachec.compiler.graphs.prepare import compute_only, engine, linear
from cachec.compiler.planning.estimate import estimate, in_bytes, in_count, in_flops
from cachec.compiler.planning.estimate_words import describe_estimate
from cachec.compiler.planning.gpus import MEASURED, GpuFigures, get_gpus

GPU = GpuFigures("H100", 1e6, 1e9, "nowhere")


@pytest.fixture(scope="module")
def found(toy_split):
    plain = linear(toy_split)
    return estimate(plain, engine(plain, ToyModel.io), ToyModel.spec, replace(SETTINGS, steps=8), budget=2, batch=3)


def test_sizes_are_the_toys(found):
    numbers = sum(parameter.numel() for parameter in ToyDiT().parameters())
    tail = sum(
        parameter.numel() for layer in ("out", "norm_out", "time") for parameter in getattr(ToyDiT(), layer).parameters()
    )
    tail += sum(parameter.numel() for parameter in ToyDiT().blocks[0].modulation.parameters())
    assert (found.total, found.parameters["tail"]) == (numbers, tail)
    assert found.feature == found.velocity == TOKENS * WIDTH * 4
    assert found.slots("hidden") == found.slots("output") == 3 * 2 * found.feature
    assert found.features_of_prompt == 8 * found.feature
    assert found.weights >= 4 * numbers
    assert found.needed == found.weights + found.slots("hidden") + 3 * found.activations + found.step_values


def test_a_request_is_its_computed_steps_and_on_the_hidden_cut_its_forecasts(found):
    assert 0 < found.forecast < found.computed / 3
    assert found.ratio("output") == 4
    assert found.run_flops("hidden") - found.run_flops("output") == 3 * 6 * found.forecast
    assert found.on(GPU)["step"] == 3 * found.computed / 1e9
    assert found.on(GPU)["all_computed"] == pytest.approx(8 * found.on(GPU)["step"])


def test_a_gpu_that_is_too_small_is_said_to_be(found):
    small = replace(GPU, memory=found.needed - 1)
    assert "needs more than its" in dict(describe_estimate(found, [small]))["floor on H100"]
    assert "needs more than its" not in dict(describe_estimate(found, [replace(GPU, memory=found.needed)]))["floor on H100"]


def test_a_measurement_stands_beside_the_floor_of_one_sample(found):
    known = MEASURED[0]
    spec, settings = replace(found.spec, source=known.source), replace(found.settings, height=1024, width=1024)
    same = replace(found, spec=spec, settings=settings, batch=1, computed=round(0.5 * known.seconds * GPU.peak))
    assert "a step was measured at 129 ms, 50% of peak (sglang" in dict(describe_estimate(same, [GPU]))["floor on H100"]
    assert "measured" not in dict(describe_estimate(replace(same, batch=2), [GPU]))["floor on H100"]


def test_without_a_forecast_graph_the_rest_is_as_it_was(found, toy_split):
    plain = compute_only(toy_split)
    other = estimate(plain, engine(plain, ToyModel.io), found.spec, found.settings, budget=2, batch=3)
    assert (other.total, other.computed, other.forecast, other.parameters["tail"]) == (found.total, found.computed, 0, 0)


def test_json_has_every_gpu_that_is_asked_for(found):
    content = found.to_json(get_gpus(None))
    assert content["floor"].keys() == {gpu.name for gpu in get_gpus(None)}
    assert content["cuts"]["output"]["ratio_of_flops"] == 4


def test_numbers_are_written_with_their_units():
    assert [in_bytes(size) for size in (0, 999, 25.2e6, 23.8e9)] == ["0.00 B", "999.00 B", "25.20 MB", "23.80 GB"]
    assert in_flops(74.4e12) == "74.40 TFLOP"
    assert (in_count(11_901_408_320), in_count(2_400_000)) == ("11.90 billion", "2.40 million")
