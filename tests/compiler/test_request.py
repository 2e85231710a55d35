"""From options to a checked request; what the command line says of wrong ones is in test_cli.py."""

import pytest

from cachec.compiler.models import MODELS
from cachec.compiler.request import REFERENCE_FACTOR, make_request
from cachec.engines.targets import TargetName
from cachec.runtime.engine import HOST
from cachec.runtime.errors import InputError

SPEC = MODELS["tiny-flux"]


def test_defaults_are_those_of_the_model_and_the_method():
    request = make_request(SPEC)
    assert vars(request.settings) == {
        "height": 128, "width": 128, "text_tokens": 24, "guidance": 3.5, "steps": 50, "dtype": "float32",
        "frames": 1, "cut": None, "sigmas": None, "true_cfg_scale": 1.0, "shorter_texts": (),
    }  # fmt: skip
    assert request.method.name == "lesa"
    assert (request.interval, request.schedule.compute[:5]) == (request.method.default_interval, (0, 1, 2, 3, 9))
    assert (request.targets, request.device) == ((TargetName("ort"),), HOST)
    assert not request.needs_calibration


def test_what_looks_at_calibration_runs_says_so():
    assert make_request(SPEC, method="gram").fits
    assert make_request(SPEC, method="taylor", schedule="search", budget=9).fits
    gated = make_request(SPEC, method="taylor", min_psnr=30.0)
    assert (gated.fits, gated.needs_calibration) == (False, True)
    assert make_request(SPEC, method="gram", target_speedup=3.0).wants_speed


def test_the_fine_reference_is_that_of_the_file_or_some_times_finer():
    assert make_request(SPEC, method="gram", levels="fine").reference_steps == REFERENCE_FACTOR * 50
    assert make_request(SPEC, method="gram", levels="fine", calibration="c").reference_steps is None
    assert make_request(SPEC, method="gram", reference_steps=100).fits_fine


def test_builders_get_sizes_by_the_schedule(tmp_path):
    options = make_request(SPEC, method="taylor", budget=10, batch=2, workspace=1.5).options_for(tmp_path, guided=False)
    assert (options.sizes["batch"].most, options.sizes["slots"].usual) == (2, 10)
    assert (options.workspace, options.timing_cache) == (1_500_000_000, tmp_path)
    assert make_request(SPEC, method="gram", budget=9).computed == 9  # searched for, but so many


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 2, "max_batch": 4}, "batch 2 and max-batch 4 contradict each other"),
        ({"targets": ("ort", "ort")}, "target ort is given twice"),
        ({"targets": ()}, "no target given"),
        ({"min_psnr": 0.0}, "min-psnr is 0.0"),
        ({"workspace": 0.0}, "workspace is 0.0 GB"),
        ({"slots": "int8"}, "unknown slot type 'int8'"),
        ({"lora": "none.safetensors"}, "lora none.safetensors: there is no such file"),
        ({"hoist": "some"}, "unknown hoist 'some'"),
        ({"method": "adams", "fold": "none"}, "adams has no predictor graph to keep"),
        ({"method": "taylor", "fold": "none", "schedule": "search", "budget": 9}, "needs its forecasts as numbers"),
        ({"method": "taylor", "levels": "fine"}, "level fine is fitted to a fine reference, which taylor cannot be"),
        ({"method": "gram", "levels": "fine", "reference_steps": 0}, "reference-steps is 0, but level fine"),
        ({"method": "taylor", "reference_steps": 100}, "taylor is not fitted to a reference"),
        ({"method": "gram", "schedule": "0,9", "reference_steps": 100}, "take --schedule search"),
        ({"method": "gram", "calibration": "c", "prompts": "p"}, "a given calibration has its prompts"),
    ],
)
def test_options_that_cannot_go_together_or_be_used_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        make_request(SPEC, **given)
