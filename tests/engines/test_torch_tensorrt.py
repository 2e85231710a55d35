"""The Torch-TensorRT route, as far as it goes without a GPU: its settings, names and errors.

``torch_tensorrt`` cannot be imported on a CPU; what it takes is read from the sources of its wheel (``tests/data``).
"""

import json
import sys
import types
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from engine_toys import layer

from cachec.compiler.graphs.build_engines import LooseSources
from cachec.engines import torch_tensorrt
from cachec.engines.tensorrt import PlanBuilder
from cachec.engines.torch_tensorrt import BUILDER, SETTINGS, TorchTensorRTEngine, check_outputs, import_builder, make_settings
from cachec.runtime.abi import BATCH
from cachec.runtime.build_options import BuildOptions, SizeRange
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import EngineError, InputError, MissingExtraError

GPU = DeviceName("cuda", 1)
TRUTH = json.loads((Path(__file__).parent.parent / "data" / "torch-tensorrt-2.13-settings.json").read_text())


@pytest.fixture
def builder(monkeypatch):
    """A module with the settings of 2.13, which notes what it is asked to convert."""
    module = types.ModuleType("torch_tensorrt")
    module.__version__ = "2.13.0"
    module.calls = []

    class Input:
        def __init__(self, **facts):
            vars(self).update(facts)

    def convert(program, *, arg_inputs, kwarg_inputs, **settings):
        assert {"arg_inputs", "kwarg_inputs", *settings} <= set(TRUTH["parameters"])
        module.calls.append((program, arg_inputs, kwarg_inputs, settings))
        return b"a plan"

    module.Device, module.Input = str, Input
    module.dynamo = types.SimpleNamespace(
        CompilationSettings=make_dataclass("CompilationSettings", TRUTH["settings"]),
        convert_exported_program_to_serialized_trt_engine=convert,
    )
    monkeypatch.setattr(torch_tensorrt, "import_builder", lambda: module)
    monkeypatch.setattr(TorchTensorRTEngine, "version", classmethod(lambda cls: "11.0"))
    monkeypatch.setattr(PlanBuilder, "gpus", lambda *_: (90,))
    return module


@pytest.fixture(scope="module")
def plan():
    return layer()[1]


def test_settings_are_those_of_the_version(builder, tmp_path):
    options = BuildOptions(level=4, workspace=10**9, compatibility="ampere-plus")
    settings = make_settings(builder, options, tmp_path / "t.timing", GPU)
    assert settings.keys() <= set(TRUTH["parameters"])
    assert settings == {
        **SETTINGS,
        "device": "cuda:1",
        "optimization_level": 4,
        "workspace_size": 10**9,
        "hardware_compatible": True,
        "timing_cache_path": str(tmp_path / "t.timing"),
    }
    assert SETTINGS["attn_bias_is_causal"] is False
    assert SETTINGS["truncate_double"] is SETTINGS["require_full_compilation"] is True


def test_settings_that_the_version_does_not_know_are_refused(builder, monkeypatch):
    monkeypatch.setattr(torch_tensorrt, "SETTINGS", {**SETTINGS, "atn_bias_is_causal": False})
    with pytest.raises(InputError, match="Torch-TensorRT 2.13.0 does not know the setting atn_bias_is_causal"):
        make_settings(builder, BuildOptions(), None, GPU)


def build(plan, folder):
    sources = LooseSources([plan], folder, "float32", "6x8")
    return BUILDER.build(sources, folder, device=GPU, options=BuildOptions(sizes={BATCH: SizeRange(1, 2, 3)}))


def test_graphs_are_converted_with_their_names_and_ranges(builder, plan, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.export.passes.move_to_device_pass", lambda program, place: (program, place))
    files = build(plan, tmp_path)
    assert files == {"compute": tmp_path / "compute-11.0_sm90-float32-6x8.plan"}
    assert files["compute"].read_bytes() == b"a plan"
    (((program, place), arguments, inputs, _),) = builder.calls
    assert (program, place, arguments) == (plan.program, "cuda:1", [])
    assert list(inputs) == ["x"]
    given = vars(inputs["x"])
    assert given == {"min_shape": (1, 4), "opt_shape": (2, 4), "max_shape": (3, 4), "dtype": torch.float32}
    placeholders = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    assert placeholders[-1:] == list(inputs)  # the names that the engine's inputs get


def test_what_it_says_is_passed_on(builder, plan, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Conversion of module\n not currently supported")

    builder.dynamo.convert_exported_program_to_serialized_trt_engine = fail
    monkeypatch.setattr("torch.export.passes.move_to_device_pass", lambda program, _: program)
    with pytest.raises(EngineError, match="cannot build the compute engine: Conversion of module not currently supported"):
        build(plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_outputs_are_numbered(plan):
    assert TorchTensorRTEngine.tensor_names(plan.signature) == {"y": "output0", "total": "output1"}


def test_values_that_are_given_twice_are_refused(plan):
    check_outputs(plan.name, plan.program)

    class Twice(torch.nn.Module):
        def forward(self, x):
            y = x + 1
            return y, y

    with pytest.raises(EngineError, match="the compute graph gives one value under two names"):
        check_outputs("compute", torch.export.export(Twice(), (torch.ones(2),)))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs 'torch_tensorrt', .*pip install 'cachec\[torch-tensorrt\]'"):
        import_builder()


def test_a_package_that_cannot_be_imported_says_why(monkeypatch, tmp_path):
    (tmp_path / "torch_tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    with pytest.raises(MissingExtraError, match=r"cannot be imported: libnvinfer.so.11: .*take --target tensorrt"):
        import_builder()


def test_hardware_compatibilities_that_it_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(torch_tensorrt, "import_builder", lambda: None)
    monkeypatch.setattr(TorchTensorRTEngine, "check_target", classmethod(lambda *_: None))
    with pytest.raises(InputError, match="none and ampere-plus only"):
        BUILDER.check_build(GPU, "float32", BuildOptions(compatibility="same-capability"))
