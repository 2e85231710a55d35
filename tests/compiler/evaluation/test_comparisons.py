from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from toy_model import SETTINGS, ToyModel

from cachec.compiler.evaluation.comparisons import compared_level, compared_rows, level_rows, parse_against, sampler_program
from cachec.compiler.methods import METHODS, get_method
from cachec.compiler.methods.lesa import Lesa
from cachec.compiler.methods.taylor import Taylor
from cachec.runtime.abi import FORECAST
from cachec.runtime.errors import InputError
from cachec.runtime.noise import make_noise
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


def test_engines_that_a_bundle_lacks_are_built_and_do_what_its_own_would(loaded, tmp_path):
    bare = replace(loaded, engines={name: engine for name, engine in loaded.engines.items() if name != FORECAST})
    given = {"prompt": make_noise(1, (8,))[None]}, make_noise(0, (6, 8))[None]
    with ExitStack() as stack:
        rows = [
            compared_rows(parse_against("plain,reuse"), one, ToyModel(), level="default", work=tmp_path, stack=stack)
            for one in (bare, loaded)
        ]
        (plain, reuse), (_, own) = rows
        assert plain.engines is bare.engines
        assert own.engines is loaded.engines
        assert [row.kind for row in rows[0]] == ["solver", "method"]
        np.testing.assert_allclose(reuse.session(bare).run(*given), own.session(loaded).run(*given), atol=1e-6)


def test_the_compared_level_is_the_first_that_forecasts_unless_named(loaded):
    assert compared_level(loaded, None) == "default"
    with pytest.raises(InputError, match="unknown level 'uncached'"):
        compared_level(loaded, "uncached")
    assert [(row.name, row.kind) for row in level_rows(loaded)] == [("uncached", "uncached"), ("default", "level")]
