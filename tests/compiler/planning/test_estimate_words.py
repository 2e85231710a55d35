"""What stands in the table of an estimate."""

from dataclasses import replace

from cachec.compiler.planning.estimate_words import describe_estimate
from cachec.compiler.planning.gpus import MEASURED
from cachec.runtime.room import in_bytes


def test_a_gpu_that_is_too_small_is_said_to_be(found, gpu):
    small = replace(gpu, memory=found.needed - 1)
    assert "needs more than its" in dict(describe_estimate(found, [small]))["floor on H100"]
    assert "needs more than its" not in dict(describe_estimate(found, [replace(gpu, memory=found.needed)]))["floor on H100"]


def test_a_measurement_stands_beside_the_floor_of_one_sample(found, gpu):
    known = MEASURED[0]
    spec, settings = replace(found.spec, source=known.source), replace(found.settings, height=1024, width=1024)
    same = replace(found, spec=spec, settings=settings, batch=1, computed=round(0.5 * known.seconds * gpu.peak))
    assert "a step was measured at 129 ms, 50% of peak (sglang" in dict(describe_estimate(same, [gpu]))["floor on H100"]
    assert "measured" not in dict(describe_estimate(replace(same, batch=2), [gpu]))["floor on H100"]


def test_the_peak_of_a_whole_request_is_of_all_parts_and_of_the_largest_phase(found, gpu):
    assert "whole request" not in dict(describe_estimate(found, [gpu])), "nothing is known of other parts"
    parts = {"text_encoder": 3 * found.needed, "text_encoder_2": found.needed, "vae": 2 * found.needed}
    said = dict(describe_estimate(replace(found, others=parts), [gpu]))["whole request"]
    kept, phase = in_bytes(7 * found.needed), in_bytes(4 * found.needed)
    assert said.startswith(f"{kept} where all parts are kept, {phase} where each is there for its phase: text_encoder ")
