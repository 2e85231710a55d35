"""The register of methods."""

import sys

import pytest

from cachec.compiler.methods import METHODS, get_method
from cachec.runtime.errors import InputError


@pytest.mark.parametrize("name", METHODS)
def test_methods_name_themselves_and_cite_a_source(name):
    method = get_method(name)
    assert method.name == name
    assert "arXiv" in sys.modules[method.__module__].__doc__


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="unknown method 'tailor'. Did you mean 'taylor'"):
        get_method("tailor")
