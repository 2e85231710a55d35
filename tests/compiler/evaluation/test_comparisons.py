import numpy as np
import pytest
from toy_model import SETTINGS, ToyModel

from cachec.compiler.evaluation.comparisons import parse_against, sampler_program
from cachec.compiler.methods import METHODS, get_method
from cachec.compiler.methods.lesa import Lesa
from cachec.compiler.methods.taylor import Taylor
from cachec.runtime.errors import InputError
from cachec.runtime.program import ProgramKey, hash_sigmas


def test_entries_are_methods_with_an_order_and_solvers():
    taylor, reuse, lesa, plain, solver = parse_against("taylor:2, reuse,lesa:5,plain,ab2,")
    assert (taylor.name, taylor.method, taylor.interval) == ("taylor:2", Taylor(2), None)
    assert reuse.method == get_method("reuse")()
    assert (lesa.method, lesa.interval) == (Lesa(), 5)
    assert plain.method is None
    assert solver.name == "ab2"


def test_other_options_are_named():
    (entry,) = parse_against("taylor:order=3")
    assert entry.method == Taylor(3)


def test_nothing_to_compare_with_is_fine():
    assert parse_against("") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tailor:1", "unknown entry of --against 'tailor'. Did you mean 'taylor'?"),
        ("taylor:x", "whole number"),
        ("taylor:", "taylor:2"),
        ("taylor:odrer=2", "Did you mean 'order'?"),
        ("reuse:2", "has no options"),
        ("plain:2", "takes no options"),
        ("lesa:x", "interval must be a whole number"),
        ("reuse,reuse", "names reuse twice"),
    ],
)
def test_wrong_entries_are_refused(text, message):
    with pytest.raises(InputError) as error:
        parse_against(text)
    assert message in str(error.value)


@pytest.mark.parametrize("name", [name for name in METHODS if get_method(name).needs_calibration])
def test_methods_that_are_fitted_to_the_model_are_not_made_on_the_side(name):
    with pytest.raises(InputError, match="needs calibration; compile a bundle with it instead"):
        parse_against(name)


def test_the_models_sampler_on_fewer_steps_computes_them_all():
    model = ToyModel()
    program = sampler_program(model, SETTINGS, ProgramKey(50, "other", {"height": 16}), 3)
    assert program.compute_steps == (0, 1, 2)
    np.testing.assert_allclose(program.sigmas, [1, 2 / 3, 1 / 3, 0], atol=1e-6)
    assert program.key.sigmas_hash == hash_sigmas(program.sigmas)
