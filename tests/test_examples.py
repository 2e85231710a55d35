"""The scripts of ``examples/`` run, and what they print is as they say."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ELSEWHERE = "dynamo_worker"  # needs what no test installs
SCRIPTS = sorted(script for script in EXAMPLES.glob("*.py") if script.stem != ELSEWHERE)


@pytest.mark.skipif(not SCRIPTS, reason="the source tree is not beside the tests")
def test_there_are_three():
    assert [script.stem for script in SCRIPTS] == ["accelerate_flux", "bundle_as_transformer", "negative_prompt"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_runs_and_comes_near(script, capsys):
    runpy.run_path(str(script), run_name="__main__")
    errors = [float(one) for one in re.findall(r"relative error of the latents (\d\.\d+)", capsys.readouterr().out)]
    assert 0 < max(errors) < 0.5
