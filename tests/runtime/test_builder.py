"""What every back end's builder has unless it says otherwise."""

import pytest
from engine_toys import layer

from cachec.compiler.graphs.build_engines import LooseSources
from cachec.engines import get_builder
from cachec.runtime.build_options import DEFAULTS
from cachec.runtime.builder import EngineBuilder
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST
from cachec.runtime.errors import InputError


def test_files_are_named_by_sizes_and_lengths_of_texts(tmp_path):
    assert LooseSources([layer()[1]], tmp_path, shape_bucket="64x96, 16 text tokens").size == "64x96-16"


def test_a_builder_asks_its_engine_whether_a_device_is_there_and_needs_nothing_more():
    builder = get_builder("eager")
    builder.check_build(HOST, "float32", DEFAULTS)
    with pytest.raises(InputError, match="cuda"):
        builder.check_build(DeviceName("cuda", 99), "float32", DEFAULTS)
    assert builder.needs(HOST, DEFAULTS) == {}
    assert not builder.bounded


def test_a_builder_that_cannot_build_is_none():
    with pytest.raises(TypeError, match="build"):
        EngineBuilder(get_builder("eager").engine)
