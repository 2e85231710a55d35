import pytest

from cachec.engines import open_bundle
from cachec.runtime.errors import BundleError
from cachec.runtime.origin import LateEngines


class Engine:
    def __init__(self):
        self.closed = False

    def close(self):
        self.closed = True


def test_late_engines_are_loaded_when_they_are_asked_for_and_again_after_release():
    made = []

    def load():
        made.append({"a": Engine()})
        return made[-1]

    engines = LateEngines(["a"], load)
    assert (list(engines), len(engines), made) == (["a"], 1, [])
    first = engines["a"]
    assert engines["a"] is first
    engines.release()
    assert first.closed
    assert not engines.is_loaded
    assert engines["a"] is not first
    with pytest.raises(KeyError):
        engines["b"]


def test_a_bundle_that_is_opened_late_loads_its_engines_for_its_first_session(toy_bundle):
    with open_bundle(toy_bundle, late=True) as loaded:
        assert not loaded.engines.is_loaded
        loaded.session()
        assert loaded.engines.is_loaded
        loaded.origin.release()
        loaded.session()
    with pytest.raises(BundleError, match="the engine was closed"):
        loaded.session()
