"""What prompts are for: shipped lists by place, a user's own by a hash, and never one prompt for two things."""

import pytest

from cachec.compiler.calibration.prompts import default_prompts, split_prompts
from cachec.compiler.calibration.uses import NUM_MEASURE, UsedPrompts, calibration_prompts, training_prompts
from cachec.runtime.errors import InputError

OWN = tuple(f"prompt {i}" for i in range(40))


@pytest.mark.parametrize("name", ["shapes", "general"])
def test_of_a_shipped_list_every_fourth_is_to_stop_by_and_others_are_to_measure_on(name):
    chosen, listed = calibration_prompts(name, None, 12), default_prompts(name, "train")
    assert chosen.prompts == (*listed[:12], *default_prompts(name, "measure")[:NUM_MEASURE])
    assert chosen.places("stop") == [3, 7, 11]
    assert chosen.places("measure") == list(range(12, 12 + NUM_MEASURE))
    training = training_prompts(name, None)
    assert training.prompts == tuple(listed)
    assert training.places("stop") == list(range(0, len(listed), 4))
    assert not set(training.prompts) & set(chosen.only("measure").prompts)


def test_a_users_own_prompts_have_one_use_each_in_calibration_and_training_alike():
    split, chosen, training = split_prompts(OWN), calibration_prompts("shapes", OWN), training_prompts("shapes", OWN)
    assert chosen.prompts == (*split.fit, *split.stop, *split.measure)
    assert training == chosen.only("fit", "stop")
    assert sorted(chosen.prompts) == sorted(OWN)
    assert chosen.only("measure").prompts == split.measure


def test_too_few_prompts_are_refused_with_what_they_are_for():
    with pytest.raises(InputError, match="7 prompts are too few: . to fit on, . to choose by, . to measure on"):
        calibration_prompts("shapes", OWN[:7])
    with pytest.raises(InputError, match="9 prompts are too few: 9 to fit on, 0 to choose by, 0 to measure on"):
        calibration_prompts("shapes", split_prompts(OWN).fit[:9])
    with pytest.raises(InputError, match="prompt 2 is empty"):
        UsedPrompts(("a", " "), ("fit", "fit"))


def test_a_missing_use_is_named():
    prompts = calibration_prompts("shapes", OWN).only("fit", "measure")
    prompts.check(("fit", "measure"), "c")
    with pytest.raises(InputError, match="calibration c has no prompts to stop: make one with more prompts"):
        prompts.check(("fit", "stop", "measure"), "c")
