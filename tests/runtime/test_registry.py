"""Names and the classes they mean."""

from collections import OrderedDict
from importlib.metadata import EntryPoint

import pytest

from cachec.runtime import registry
from cachec.runtime.errors import InputError, MissingExtraError
from cachec.runtime.registry import Registry


@pytest.fixture
def names(monkeypatch):
    points = [
        EntryPoint("theirs", "collections:OrderedDict", "cachec.tests"),
        EntryPoint("both", "no_such.part:Thing", "cachec.tests"),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "cachec.tests" else [])
    return Registry("thing", "cachec.tests", {"ours": "collections:Counter", "both": "json.decoder:JSONDecoder"})


def test_classes_are_found_by_name(names):
    assert names["ours"].__name__ == "Counter"
    assert names["theirs"] is OrderedDict
    names.register("given", dict)
    assert names["given"] is dict
    assert list(names) == ["both", "given", "ours", "theirs"]
    assert "theirs" in names
    assert len(names) == 4


def test_a_name_that_two_packages_bring_is_refused_with_both(names):
    with pytest.raises(InputError, match="thing 'both' comes with json and no_such: uninstall one of them"):
        names["both"]


def test_a_name_keeps_its_meaning(names):
    names.register("given", dict)
    names.register("given", dict)
    with pytest.raises(InputError, match=r"thing 'given' means <class 'dict'> already: register .*list.* under another name"):
        names.register("given", list)


def test_an_unknown_name_is_refused_with_the_nearest(names):
    with pytest.raises(InputError, match=r"unknown thing 'their'. Did you mean 'theirs'\? Known: both, ours, theirs"):
        names["their"]


def test_a_class_whose_package_is_missing_names_the_extra():
    with pytest.raises(MissingExtraError, match=r"thing 'far' needs 'no_such_package'.*pip install 'cachec\[compile\]'"):
        Registry("thing", "cachec.tests", {"far": "no_such_package.part:Thing"})["far"]


def test_a_class_of_ours_that_is_not_there_is_no_missing_package():
    with pytest.raises(ModuleNotFoundError, match="No module named 'cachec.nowhere'"):
        Registry("thing", "cachec.tests", {"lost": "cachec.nowhere:Thing"})["lost"]
