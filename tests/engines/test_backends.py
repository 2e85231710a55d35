"""The table of back ends, and what a machine that only runs engines imports."""

import subprocess
import sys

import pytest

from cachec.engines.backends import BACKENDS, FROM_ONNX, get_builder, get_engine
from cachec.engines.targets import PREFERENCE
from cachec.runtime.errors import InputError


@pytest.mark.parametrize("name", BACKENDS)
def test_both_faces_have_the_name(name):
    assert get_engine(name).name == name
    assert get_builder(name).engine is get_engine(name)


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="unknown backend 'agert'. Did you mean 'eager'"):
        get_engine("agert")


def test_all_have_a_rank():
    assert sorted(PREFERENCE) == sorted(BACKENDS)
    assert set(FROM_ONNX) < set(BACKENDS)


RUN_ONLY = """
import sys
for name in ("torch", "onnx", "onnx_ir", "onnxscript", "tqdm", "diffusers"):
    sys.modules[name] = None
import cachec
with cachec.load(sys.argv[1], target="ort") as loaded:
    loaded.session()
from cachec.engines import get_engine
get_engine("tensorrt"), get_engine("tensorrt-rtx")
builders = ("cachec.engines.onnx_files", "cachec.engines.tensorrt_from_onnx", "cachec.engines.build_target")
assert not set(builders) & set(sys.modules), set(builders) & set(sys.modules)
"""


def test_running_loads_nothing_that_builds(onnx_toy):
    subprocess.run([sys.executable, "-c", RUN_ONLY, str(onnx_toy)], check=True, timeout=120)
