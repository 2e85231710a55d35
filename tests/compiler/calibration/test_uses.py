"""What prompts are for: shipped lists by place, a user's own by a hash, and never one prompt for two things."""

import pytest

from cachec.compiler.calibration.prompts import default_prompts, split_prompts
from cachec.compiler.calibration.uses import (
    NUM_CHOOSE,
    NUM_FIT,
    NUM_MEASURE,
    UsedPrompts,
    calibration_prompts,
    training_prompts,
)
from cachec.runtime.errors import InputError

OWN = tuple(f"prompt {i}" for i in range(40))


@pytest.mark.parametrize("name", ["avatars", "general"])
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
    split, chosen, training = split_prompts(OWN), calibration_prompts("avatars", OWN), training_prompts("avatars", OWN)
    assert chosen.prompts == (*split.fit, *split.stop, *split.measure)
    assert training == chosen.only("fit", "stop")
    assert sorted(chosen.prompts) == sorted(OWN)
    assert chosen.only("measure").prompts == split.measure


def test_schedules_are_chosen_by_a_list_of_others_if_that_is_asked_for():
    chosen, others = calibration_prompts("avatars", None, choosing=True), default_prompts("avatars", "choose")
    assert (len(chosen.places("fit")), len(chosen.places("choose"))) == (NUM_FIT, NUM_CHOOSE)
    assert chosen.prompts[chosen.num_whole :] == tuple(others[:NUM_CHOOSE])
    known = [set(default_prompts("avatars", use)) for use in ("train", "choose", "measure", "eval")]
    assert sum(map(len, known)) == len(set().union(*known))
    assert "96 to choose schedules by" in chosen.in_words
    assert calibration_prompts("avatars", None).places("choose") == []
    assert calibration_prompts("general", None, choosing=True).places("choose") == []


def test_of_many_prompts_of_a_user_those_that_need_not_be_fitted_choose_schedules():
    many = tuple(f"prompt {i}" for i in range(240))
    split, chosen = split_prompts(many), calibration_prompts("avatars", many, choosing=True)
    assert chosen.only("fit").prompts == split.fit[:NUM_FIT]
    assert chosen.only("choose").prompts == split.fit[NUM_FIT : NUM_FIT + NUM_CHOOSE]
    assert training_prompts("avatars", many).only("fit").prompts == split.fit
    assert calibration_prompts("avatars", many).only("fit").prompts == split.fit
    few = calibration_prompts("avatars", many[:150], choosing=True)
    assert (few.places("choose"), few.only("fit").prompts) == ([], split_prompts(many[:150]).fit)


def test_prompts_to_choose_schedules_by_come_last():
    assert UsedPrompts(("a", "b", "c"), ("fit", "choose", "choose")).num_whole == 1
    with pytest.raises(InputError, match="prompts to choose schedules by are not the last ones"):
        UsedPrompts(("a", "b"), ("choose", "fit"))


def test_too_few_prompts_are_refused_with_what_they_are_for():
    with pytest.raises(InputError, match="7 prompts are too few: . to fit on, . to choose by, . to measure on"):
        calibration_prompts("avatars", OWN[:7])
    with pytest.raises(InputError, match="9 prompts are too few: 9 to fit on, 0 to choose by, 0 to measure on"):
        calibration_prompts("avatars", split_prompts(OWN).fit[:9])
    with pytest.raises(InputError, match="prompt 2 is empty"):
        UsedPrompts(("a", " "), ("fit", "fit"))


def test_a_missing_use_is_named():
    prompts = calibration_prompts("avatars", OWN).only("fit", "measure")
    prompts.check(("fit", "measure"), "c")
    with pytest.raises(InputError, match="calibration c has no prompts to stop: make one with more prompts"):
        prompts.check(("fit", "stop", "measure"), "c")
