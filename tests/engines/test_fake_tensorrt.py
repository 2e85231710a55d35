"""The fake TensorRT itself: the API file's names, arguments as pybind11 takes them, refusals as TensorRT's."""

from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from fake_tensorrt import Fake

from cachec.engines.tensorrt_from_onnx import PlanFromOnnx
from cachec.engines.tensorrt_library import Reports
from cachec.runtime.build_options import BuildOptions
from cachec.runtime.bundle import Bundle
from cachec.runtime.sizes import size_ranges


@pytest.fixture
def fake():
    return Fake()


def draft_of(fake, bundle, name="advance"):
    artifact = Bundle.open(bundle).manifest.targets[0].engines[name]
    plan = PlanFromOnnx(fake.module, BuildOptions(sizes=size_ranges(10, 4)))
    return plan.prepare(name, bundle / artifact.path, artifact.signature), artifact.signature


@pytest.fixture
def built(fake, onnx_toy):
    """A fake, a plan, and its signature."""
    draft, signature = draft_of(fake, onnx_toy)
    plan = draft.builder.build_serialized_network(draft.network, draft.config)
    with pytest.raises(TypeError):
        len(plan)  # a buffer without a length, as TensorRT's
    return fake, bytes(plan), signature


BAD_CALLS = {
    "builder.create_network(0, 1)": TypeError,
    "builder.create_network(flag=0)": TypeError,
    "builder.build_engine(1)": AttributeError,
    "config.set_flag(1)": TypeError,
    "config.set_flag(trt.BuilderFlag.FP16)": AttributeError,
    "trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH": AttributeError,
    "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1.5)": TypeError,
    "setattr(config, 'num_optimization_profiles', 1)": AttributeError,
    "setattr(config, 'max_workspace_size', 1)": AttributeError,
    "setattr(config, 'builder_optimization_level', '3')": TypeError,
    "setattr(config, 'progress_monitor', print)": TypeError,
    "parser.parse_from_file(Path('x'))": TypeError,
    "parser.num_errors()": TypeError,
    "profile.set_shape('x', (1,), (1,))": TypeError,
    "profile.set_shape('x', 1, 1, 1)": TypeError,
    "trt.ICudaEngine()": TypeError,
    "trt.Runtime()": TypeError,
    "trt.Runtime(None)": TypeError,
    "list(trt.BuilderFlag)": TypeError,
    "trt.BuilderFlag['REFIT']": TypeError,
    "trt.BuilderFlag(0)": TypeError,
    "1 + trt.BuilderFlag.REFIT": TypeError,
    "builder.reset()": NotImplementedError,
}


def test_bad_calls_raise_as_in_python_bindings(fake):
    trt = fake.module
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    names = {
        "trt": trt,
        "Path": Path,
        "builder": builder,
        "config": builder.create_builder_config(),
        "parser": trt.OnnxParser(network, logger),
        "profile": builder.create_optimization_profile(),
    }
    for code, error in BAD_CALLS.items():
        with pytest.raises(error):
            eval(code, names)


def test_subclasses_that_forget_their_base_are_refused(fake):
    class Log(fake.module.ILogger):
        def __init__(self):
            self.lines = []

    with pytest.raises(TypeError, match="must be called when overriding __init__"):
        fake.module.Builder(Log())


def test_enums_compare_by_member(fake):
    trt = fake.module
    assert trt.BuilderFlag.__members__["REFIT"] == trt.BuilderFlag.REFIT
    assert int(trt.BuilderFlag.REFIT) != trt.BuilderFlag.REFIT
    assert range(99)[trt.BuilderFlag.REFIT] == int(trt.BuilderFlag.REFIT)
    assert trt.float32 == trt.DataType.FLOAT
    assert trt.Logger.ERROR == trt.ILogger.Severity.ERROR
    assert trt.Logger(trt.Logger.INFO).min_severity == trt.Logger.INFO


def test_the_surface_is_the_api_file_s(fake):
    for name, kind in fake.api.classes.items():
        cls = fake.module.ILogger.Severity if name == fake_tensorrt.tensorrt_api.SEVERITY else getattr(fake.module, name)
        if kind.enum:
            assert set(cls.__members__) == set(kind.enum)
        else:
            public = {key for key in dir(cls) if not key.startswith("_")} - {"Severity"}
            assert public == {key for key in (*kind.methods, *kind.properties) if not key.startswith("_")}, name


def test_plans_load_only_where_they_fit(built):
    """And say why not."""
    fake, plan, _ = built
    for content, other, complaint in (
        (b"no plan", fake, "magicTag"),
        (plan[:-1], fake, "too small"),
        (plan, Fake(version="11.0.1.0"), "expecting library version 11.0.1.0 got 11.0.0.114"),
        (plan, Fake(sm=(8, 9)), "expecting compute 8.9 got 9.0"),
    ):
        reports = Reports(other.module)
        assert other.module.Runtime(reports.logger).deserialize_cuda_engine(content) is None
        assert complaint in str(reports.error("load it"))


def test_what_is_not_set_or_does_not_fit_is_refused(built):
    """Addresses, shapes, scratch memory, and outputs over inputs."""
    fake, plan, signature = built
    reports = Reports(fake.module)
    engine = fake.module.Runtime(reports.logger).deserialize_cuda_engine(plan)
    context = engine.create_execution_context(fake.module.ExecutionContextAllocationStrategy.USER_MANAGED)
    room = np.zeros(1 << 20, np.uint8)
    base = -(-room.ctypes.data // 256) * 256

    def refused(done, complaint):
        assert not done
        assert complaint in str(reports.error("go on"))

    refused(context.set_input_shape("velocities", (99, 1, 6, 8)), "is not in the profile")
    refused(context.set_input_shape("next_latents", (1, 6, 8)), "is no input")
    refused(context.set_tensor_address("base", base + 64), "is not aligned to 256")
    refused(context.set_tensor_address("nonsense", base), "no input or output nonsense")
    refused(context.execute_async_v3(1), "no shape is set")
    for spec in signature.inputs:
        assert context.set_input_shape(spec.name, spec.resolve({"batch": 1, "slots": 3}))
    refused(context.execute_async_v3(1), "no address is set")
    for index, spec in enumerate((*signature.inputs, *signature.outputs)):
        assert context.set_tensor_address(spec.name, base + index * 8192)
    refused(context.execute_async_v3(1), "no device memory is set")
    context.set_device_memory(base + (1 << 18), engine.device_memory_size_v2)
    context.set_tensor_address("next_latents", base)
    refused(context.execute_async_v3(1), "output next_latents lies where inputs do")
    context.set_tensor_address("next_latents", base + (1 << 17))
    fake.is_capturing = lambda stream: True
    refused(context.execute_async_v3(1), "run once before")
    fake.is_capturing = lambda stream: False
    assert context.execute_async_v3(1)


def test_exceptions_in_the_monitor_end_the_build_and_do_not_come_out(onnx_toy):
    fake = Fake()

    class Failing(fake.module.IProgressMonitor):
        def phase_start(self, phase, parent, steps): ...

        def step_complete(self, phase, step):
            raise ValueError("boom")

        def phase_finish(self, phase): ...

    draft = draft_of(fake, onnx_toy)[0]
    draft.config.progress_monitor = Failing()
    assert draft.builder.build_serialized_network(draft.network, draft.config) is None
    assert [str(error) for error in fake.escaped] == ["boom"]
