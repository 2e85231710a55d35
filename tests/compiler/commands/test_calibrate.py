"""``cachec calibrate`` on the toy: one file, or nothing but what an interrupted one goes on from."""

import numpy as np
import pytest
from toy_model import SETTINGS

import cachec.compiler.calibration.statistics as statistics
from cachec.compiler.calibration import runs
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.calibration.runs import Subject, recording_here
from cachec.compiler.calibration.statistics import load_statistics, record_statistics
from cachec.compiler.calibration.uses import calibration_prompts
from cachec.compiler.commands.calibrate import calibrate_to_file
from cachec.compiler.models import find_model, load_model
from cachec.runtime.errors import InputError, OutputError

PROMPTS = [f"a circle of size {size}" for size in range(10)]


@pytest.fixture
def calibrate(tmp_path, toy_directory, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", 3)
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join(PROMPTS))
    (tmp_path / "out").mkdir()

    def calibrated(*, num=8, **options):
        return calibrate_to_file(str(toy_directory), tmp_path / "out" / "c", prompts=listed, num=num, **{"steps": 4, **options})

    return calibrated


def files(tmp_path):
    return sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*"))


def test_the_file_is_all_that_is_left(calibrate, tmp_path, toy_directory, toy_split):
    rows = dict(calibrate(reference_steps=8))
    assert files(tmp_path) == ["c"]
    read = load_statistics(tmp_path / "out" / "c")
    toy = load_model(find_model(str(toy_directory)))
    prompts = calibration_prompts("avatars", PROMPTS[:8])
    evaluator = GraphEvaluator(toy_split, toy.io)
    subject = Subject.of(toy, SETTINGS)
    made = record_statistics(subject, recording_here(subject, evaluator), prompts, reference_steps=8, seed=0, work=None)
    assert (read.prompts, read.facts) == (prompts, made.facts)
    np.testing.assert_allclose(read.latents, made.latents, atol=1e-5)
    np.testing.assert_allclose(read.fine_velocity_gram, made.fine_velocity_gram, rtol=1e-5, atol=1e-5)
    counts = [len(prompts.places(use)) for use in ("fit", "stop", "measure")]
    assert rows["prompts"] == "{} to fit on, {} to choose by, {} to measure on".format(*counts)
    assert rows["steps"] == "4, fine reference 8"


def test_what_is_interrupted_goes_on_where_it_was(calibrate, tmp_path, monkeypatch):
    real, noises = runs.make_noise, []

    def interrupted(seed, shape):
        noises.append(seed)
        if len(noises) == 5:
            raise KeyboardInterrupt
        return real(seed, shape)

    monkeypatch.setattr(runs, "make_noise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrate()
    assert files(tmp_path) == ["c.parts", "c.parts/calibration.json", "c.parts/runs-0000.safetensors"]
    with pytest.raises(InputError, match=r"c\.parts holds an unfinished calibration with other settings"):
        calibrate(seed=1)
    calibrate()
    assert files(tmp_path) == ["c"]
    assert len(noises) == 3 + 3 + 1 + 5  # three looks at the model; the first batch was not made again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 11}, "num is 11, but there are only 10 prompts: give more with --prompts"),
        ({"num": 7}, "num is 7; calibration needs at least 8 prompts"),
        ({"num": 0}, "num is 0; calibration needs"),
        ({"num": -3}, "num is -3; calibration needs"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 0}, "steps is 0"),
        ({"reference_steps": 6}, "reference-steps is 6; it must be a multiple of the 4 steps"),
        ({"reference_steps": -8}, "reference-steps is -8; it must be a multiple of the 4 steps"),
    ],
    ids=lambda value: ",".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused_and_leaves_nothing(calibrate, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        calibrate(**options)
    assert files(tmp_path) == []


def test_a_calibration_is_replaced_only_by_force(calibrate, tmp_path):
    calibrate()
    before = (tmp_path / "out" / "c").read_bytes()
    with pytest.raises(OutputError, match="exists already: pass --force"):
        calibrate(seed=1)
    assert (tmp_path / "out" / "c").read_bytes() == before
    calibrate(seed=1, force=True)
    assert load_statistics(tmp_path / "out" / "c").facts["seed"] == "1"
