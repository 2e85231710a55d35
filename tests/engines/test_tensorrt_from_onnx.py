"""What TensorRT's builder is asked for, on the fake; ``test_tensorrt_rtx`` asks a real one."""

from pathlib import Path

import pytest

from cachec.engines.tensorrt_from_onnx import PlanFromOnnx
from cachec.runtime.abi import COMPUTE
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.bundle import Bundle
from cachec.runtime.errors import EngineError
from cachec.runtime.sizes import size_ranges

SIZES = size_ranges(10, 4)


@pytest.fixture
def build(onnx_toy, trt, tmp_path):
    """Builds one engine of the toy with some options; returns its file."""
    artifacts = Bundle.open(onnx_toy).manifest.targets[0].engines

    def build(name=COMPUTE, timing=None, **options):
        plan, artifact = PlanFromOnnx(trt.module, BuildOptions(sizes=SIZES, **options), timing), artifacts[name]
        plan.build(name, onnx_toy / artifact.path, artifact.signature, tmp_path / f"{name}.plan")
        return tmp_path / f"{name}.plan"

    return build


def values(trt, name):
    return [value for (value,) in trt.called("IBuilderConfig", f"{name}=")]


def test_defaults(build, trt):
    assert build().stat().st_size
    assert values(trt, "builder_optimization_level") == [3]
    assert not trt.called("IBuilderConfig", "set_flag")
    assert [flag.name for (flag,) in trt.called("IBuilderConfig", "clear_flag")] == ["TF32"]
    assert not trt.called("IBuilderConfig", "set_memory_pool_limit")
    assert not values(trt, "hardware_compatibility_level")
    assert values(trt, "max_aux_streams") == []
    build("advance")
    assert values(trt, "max_aux_streams") == [0]  # small: other streams would cost more than they bring


def test_what_is_asked_for(build, trt):
    build(level=5, workspace=1_500_000_000, strip=True)
    assert values(trt, "builder_optimization_level") == [5]
    assert trt.called("IBuilderConfig", "set_memory_pool_limit") == [(trt.module.MemoryPoolType.WORKSPACE, 1_500_000_000)]
    assert {flag.name for (flag,) in trt.called("IBuilderConfig", "set_flag")} == {"REFIT_IDENTICAL", "STRIP_PLAN"}


def test_sizes_that_vary_get_a_profile_and_others_are_fixed(build, trt):
    build("advance")
    shapes = {
        name: (least[0], usual[0], most[0]) for name, least, usual, most in trt.called("IOptimizationProfile", "set_shape")
    }
    assert shapes == {"velocities": (1, 4, 10), "coefficients": (1, 1, 1)}
    assert len(trt.called("IBuilderConfig", "add_optimization_profile")) == 1


def test_no_memory_to_build(build, trt):
    trt.no_memory_for = frozenset(["build"])
    with pytest.raises(EngineError, match="there is no memory to build the compute engine: .* workspace"):
        build()


def refuse(*_):
    raise RuntimeError("an error of C++")


def test_sizes_that_the_library_refuses(build, trt, monkeypatch):
    monkeypatch.setattr(trt.module.IOptimizationProfile, "set_shape", refuse)
    with pytest.raises(EngineError, match="cannot set the sizes that the advance engine takes"):
        build("advance")


def test_without_a_driver_the_builder_says_so(trt):
    trt.no_driver = True
    with pytest.raises(EngineError, match="start TensorRT's builder, which needs a GPU and its driver"):
        PlanFromOnnx(trt.module, BuildOptions()).prepare("compute", Path("no.onnx"), None)


def test_a_node_that_the_parser_does_not_know(build, trt):
    trt.unsupported = frozenset(["LayerNormalization"])
    with pytest.raises(EngineError, match=r"TensorRT's parser rejects .*\.onnx: node \d+ '.*' \(LayerNormalization\)"):
        build()


def test_timings_are_added_to_and_those_of_another_gpu_are_not_used(build, trt, tmp_path, caplog):
    timing = tmp_path / "kernels.timing"
    build("advance", timing)
    first = timing.read_bytes()
    build("advance", timing)
    assert bytes(trt.called("IBuilderConfig", "create_timing_cache")[-1][0]) == first
    trt.sm = (8, 9)
    build("advance", timing)
    assert "kernel timings in kernels.timing are of another GPU or version: measured anew" in caplog.text
    assert timing.read_bytes() != first
