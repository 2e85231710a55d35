"""Capturing and splitting, once for what is the same."""

from dataclasses import replace

from toy_model import SETTINGS, ToyModel

from cachec.compiler.graphs.prepare import model_passes, prepare


def test_a_model_is_captured_once_for_all_steps_and_precisions(captures):
    model = ToyModel()
    single = prepare(model, SETTINGS)
    assert prepare(model, replace(SETTINGS, steps=9, guidance=2.0)) is single
    half = prepare(model, replace(SETTINGS, dtype="bfloat16"))
    assert half is prepare(model, replace(SETTINGS, dtype="bfloat16"))
    assert half is not single
    assert captures == [model.transformer]


def test_other_models_are_captured_though_their_weights_have_the_same_hash(captures):
    one, two = ToyModel(), ToyModel()
    assert prepare(one, SETTINGS) is not prepare(two, SETTINGS)
    assert captures == [one.transformer, two.transformer]


def test_observers_see_every_pass_though_it_ran_before(captures):
    model, seen = ToyModel(), []
    prepare(model, SETTINGS)
    prepare(model, SETTINGS, [lambda index, one, result: seen.append(one.name)])
    assert seen == [one.name for passes in model_passes(model, SETTINGS) for one in passes]
    assert len(captures) == 1
