"""Capturing and splitting, once for what is the same."""

from dataclasses import replace

from toy_model import SETTINGS, ToyModel

from cachec.compiler.graphs import prepare
from cachec.compiler.graphs.prepare import split_model


def test_a_model_is_captured_once_for_all_steps_and_precisions(captures):
    model = ToyModel()
    single = split_model(model, SETTINGS)
    assert split_model(model, replace(SETTINGS, steps=9, guidance=2.0)) is single
    half = split_model(model, replace(SETTINGS, dtype="bfloat16"))
    assert half is split_model(model, replace(SETTINGS, dtype="bfloat16"))
    assert half is not single
    assert captures == [model.transformer]


def test_other_models_are_captured_though_their_weights_have_the_same_hash(captures):
    one, two = ToyModel(), ToyModel()
    assert split_model(one, SETTINGS) is not split_model(two, SETTINGS)
    assert captures == [one.transformer, two.transformer]


def test_observers_see_every_pass_though_it_ran_before(captures):
    model, seen = ToyModel(), []
    split_model(model, SETTINGS)
    split_model(model, SETTINGS, [lambda index, one, result: seen.append(one.name)])
    assert seen == [one.name for one in prepare.model_passes(model, SETTINGS)]
    assert len(captures) == 1
