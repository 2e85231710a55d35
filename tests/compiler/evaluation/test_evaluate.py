import numpy as np
import pytest
from toy_bundle import SCHEDULE, STEPS
from toy_model import SETTINGS, ToyModel

from cachec.compiler.evaluation.bench import FINE_STEPS
from cachec.compiler.evaluation.evaluate import evaluate
from cachec.compiler.planning.goals import DIFFUSERS
from cachec.runtime.errors import InputError
from cachec.runtime.program import UNCACHED

PROMPTS = ["a red circle", "a blue ring"]


@pytest.fixture(scope="module")
def evaluation(loaded):
    return evaluate(loaded, ToyModel(), PROMPTS, seed=3, against="reuse,plain,ab2", keep_pictures=1)


def test_every_row_is_measured_on_every_prompt(evaluation):
    rows = {row["name"]: row for row in evaluation.rows}
    assert list(rows) == [UNCACHED, "default", "reuse", "plain", "ab2", DIFFUSERS]
    assert [row["compute_steps"] for row in rows.values()] == [STEPS, 4, 4, 4, 4, STEPS]
    assert all(len(row["psnr_db_by_prompt"]) == 2 for row in rows.values())
    assert rows[UNCACHED]["psnr_db"] is None
    assert rows[DIFFUSERS]["latent_error_max"] < 1e-5
    assert 0 < rows["default"]["latent_error"] < rows["reuse"]["latent_error"]
    assert rows["plain"]["psnr_db_min"] <= rows["plain"]["psnr_db"]


def test_what_it_was_measured_on_is_said(evaluation):
    assert evaluation.setting["schedule"] == list(SCHEDULE.compute)
    assert (evaluation.setting["level"], evaluation.setting["fine_steps"], evaluation.setting["seed"]) == (
        "default",
        FINE_STEPS,
        3,
    )
    assert evaluation.setting["probe"] is None
    assert evaluation.programs["plain"].num_steps == 4
    assert evaluation.programs["ab2"].cut == "output"


def test_kept_prompts_have_a_picture_of_every_row_and_errors_by_step(evaluation):
    (kept,) = evaluation.kept
    assert (kept.prompt, kept.seed) == (PROMPTS[0], 3)
    assert list(kept.rows) == [row["name"] for row in evaluation.rows]
    assert kept.rows["default"].psnr_db == pytest.approx(evaluation.rows[1]["psnr_db_by_prompt"][0], abs=1e-3)
    assert kept.fine.picture.shape == (SETTINGS.height, SETTINGS.width, 3)
    assert set(evaluation.errors) == {"default", "reuse", "plain", "ab2"}
    assert evaluation.errors["default"].steps[-1] == STEPS


def test_a_run_that_is_not_finite_names_its_row_and_prompt(loaded):
    class Broken(ToyModel):
        def generate(self, conditions, noise, settings):
            return np.full_like(noise, np.nan)

    with pytest.raises(InputError, match=r"row diffusers gives NaN or infinity .*seed 3"):
        evaluate(loaded, Broken(), PROMPTS, seed=3, against="")


def test_another_models_bundle_is_refused(loaded):
    with pytest.raises(InputError, match="has other weights"):
        evaluate(loaded, ToyModel(weights="b" * 64), PROMPTS, seed=0, against="")
