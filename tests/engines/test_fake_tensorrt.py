"""The fake TensorRT itself: it builds and runs real graphs, and refuses what TensorRT refuses."""

import ctypes
from pathlib import Path

import fake_tensorrt
import numpy as np
import onnx
import pytest
import tensorrt_sample
from fake_tensorrt import Fake
from toy_bundle import add_predictor, split_toy, toy_program, write_bundle

from cachec.compiler.methods.taylor import Taylor
from cachec.engines import ort

LOW, USUAL, HIGH = 1, 2, 10


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """ONNX files of the toy by engine."""
    method = Taylor(order=1)
    graphs = add_predictor(split_toy(head_axis=True), method.predictor(None), method.window)
    out = write_bundle(graphs, toy_program(graphs), method, tmp_path_factory.mktemp("fake") / "toy.cachec", "ort")
    found = {path.stem.split("-")[0]: path for path in out.rglob("*.onnx")}
    assert {"compute", "forecast"} <= set(found)
    return found


@pytest.fixture
def fake():
    return Fake()


class Aligned:
    """Arrays at addresses that are multiples of 256."""

    def __init__(self):
        self._kept = []

    def __call__(self, array, shift=0):
        room = np.zeros(array.nbytes + 512, np.uint8)
        begin = -room.ctypes.data % 256 + shift
        placed = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
        placed[...] = array
        self._kept.append(room)
        return placed


def inputs_of(path):
    """``{name: (dtype, shape with symbols)}`` of an ONNX file."""
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    types = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in graph.input}
    return {name: (types[name], shapes[name]) for name in shapes}


def sized(path, size):
    return {name: tuple(size if isinstance(d, str) else d for d in shape) for name, (_, shape) in inputs_of(path).items()}


def ranges(path):
    low, usual, high = (sized(path, size) for size in (LOW, USUAL, HIGH))
    return {name: (low[name], usual[name], high[name]) for name in low if low[name] != high[name]}


def logger_of(fake):
    return tensorrt_sample.messages(fake.module)


def plan_of(fake, path, logger=None):
    return tensorrt_sample.build(fake.module, logger or logger_of(fake), path, ranges(path), [])


def opened(fake, plan):
    logger = logger_of(fake)
    return tensorrt_sample.load(fake.module, logger, plan), logger


def values_for(path, size):
    rng = np.random.default_rng(0)
    shapes = sized(path, size)
    drawn = {
        name: rng.standard_normal(shapes[name]) if dtype.kind == "f" else np.ones(shapes[name])
        for name, (dtype, _) in inputs_of(path).items()
    }
    return {name: value.astype(inputs_of(path)[name][0]) for name, value in drawn.items()}


class Bound:
    """A loaded engine with everything set, ready to run."""

    def __init__(self, fake, path, plan=None, size=3):
        self.loaded, self.logger = opened(fake, plan or plan_of(fake, path))
        place = Aligned()
        self.inputs = {name: place(value) for name, value in values_for(path, size).items()}
        self.wanted = run_ort(path, self.inputs)
        self.outputs = {name: place(np.zeros_like(value)) for name, value in self.wanted.items()}
        self.scratch = place(np.zeros(self.loaded.engine.device_memory_size_v2, np.uint8))
        self.place = place

    def pointers(self):
        return {name: array.ctypes.data for name, array in (self.inputs | self.outputs).items()}

    def run(self, stream=1, shapes=None, **pointers):
        given = shapes or {name: value.shape for name, value in self.inputs.items()}
        return tensorrt_sample.run(self.loaded, self.scratch.ctypes.data, given, self.pointers() | pointers, stream)

    def complaint(self):
        return " ".join(self.logger.lines)


def run_ort(path, inputs):
    ort._start_thread_pool(None)
    session = ort.open_session(path, [ort.CPU_PROVIDER])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


@pytest.fixture
def bound(fake, models):
    return Bound(fake, models["compute"])


def test_every_engine_of_the_toy_computes_what_onnx_runtime_does(fake, models):
    for path in models.values():
        bound = Bound(fake, path)
        assert bound.run(), bound.complaint()
        for name, wanted in bound.wanted.items():
            np.testing.assert_array_equal(bound.outputs[name], wanted, err_msg=f"{path.stem}.{name}")
        assert set(bound.scratch) == {0xAB}, "what lies in scratch memory is lost"


def test_engines_tell_their_tensors(fake, models):
    loaded, _ = opened(fake, plan_of(fake, models["compute"]))
    trt, engine = fake.module, loaded.engine
    assert set(loaded.names(trt.TensorIOMode.INPUT)) == set(inputs_of(models["compute"]))
    assert engine.get_tensor_dtype("latents") == trt.DataType.FLOAT
    assert engine.get_tensor_shape("latents")[0] == -1
    assert [shape[0] for shape in engine.get_tensor_profile_shape("latents", 0)] == [LOW, USUAL, HIGH]
    assert engine.num_optimization_profiles == 1
    assert not engine.refittable
    assert engine.num_layers == len(onnx.load(models["compute"], load_external_data=False).graph.node)
    context = engine.create_execution_context()
    assert set(context.infer_shapes()) == set(ranges(models["compute"]))
    shapes = sized(models["compute"], 4)
    for name, shape in shapes.items():
        assert context.set_input_shape(name, shape)
    assert context.get_tensor_shape("velocity") == shapes["latents"]


def test_calls_are_recorded_in_order(fake, models):
    plan_of(fake, models["compute"])
    names = [call.method for call in fake.calls if call.cls in ("Builder", "OnnxParser")]
    assert names[:4] == ["__init__", "create_network", "__init__", "parse_from_file"]
    assert names[-1] == "build_serialized_network"
    assert fake.called("OnnxParser", "parse_from_file") == [(str(models["compute"]),)]
    assert fake.called("IBuilderConfig", "builder_optimization_level=") == [(3,)]


def parsed(trt, logger, builder, path):
    network = builder.create_network()
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    for attention in tensorrt_sample.attentions(trt, network):
        attention.decomposable = True
    return network


def test_plans_are_buffers_without_a_length(fake, models):
    trt = fake.module
    logger = logger_of(fake)
    builder = trt.Builder(logger)
    network = builder.create_network()
    assert builder.build_serialized_network(network, builder.create_builder_config()) is None
    assert "at least one output" in logger.lines[-1]
    network = parsed(trt, logger, builder, models["compute"])
    config = builder.create_builder_config()
    assert builder.build_serialized_network(network, config) is None
    assert "no optimization profile has been defined" in logger.lines[-1]
    profile = builder.create_optimization_profile()
    for name, shapes in ranges(models["compute"]).items():
        profile.set_shape(name, *shapes)
    assert config.add_optimization_profile(profile) == 0
    plan = builder.build_serialized_network(network, config)
    assert isinstance(plan, trt.IHostMemory)
    assert plan.nbytes == len(bytes(plan)) == memoryview(plan).nbytes
    with pytest.raises(TypeError):
        len(plan)
    with pytest.raises(TypeError):
        plan[0]


@pytest.mark.parametrize(
    ("name", "shapes", "complaint"),
    [
        ("latents", ((1, 4, 6, 8), (3, 4, 6, 8), (2, 4, 6, 8)), "MIN<=OPT<=MAX"),
        ("latents", ((1, 4), (1, 4, 6, 8), (2, 4, 6, 8)), "MIN<=OPT<=MAX"),
    ],
)
def test_profiles_that_are_none_are_refused_when_they_are_added(fake, name, shapes, complaint):
    logger = logger_of(fake)
    builder = fake.module.Builder(logger)
    profile = builder.create_optimization_profile()
    profile.set_shape(name, *shapes)
    assert builder.create_builder_config().add_optimization_profile(profile) == -1
    assert complaint in logger.lines[-1]


@pytest.mark.parametrize("change", ["latent", 99, None])
def test_profiles_that_do_not_fit_end_the_build(fake, models, change):
    fitting = ranges(models["compute"])
    first = fitting.pop("latents")
    if change == "latent":
        fitting["latent"] = first
    elif change is not None:
        fitting["latents"] = tuple((*shape[:-1], change) for shape in first)
    logger = logger_of(fake)
    with pytest.raises(ValueError, match="not built"):
        tensorrt_sample.build(fake.module, logger, models["compute"], fitting, [])
    assert "profile" in logger.lines[-1]
    assert "latent" in logger.lines[-1]


# --- arguments


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
    "config.get_calibration_profile": AttributeError,
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


@pytest.mark.parametrize(("code", "error"), BAD_CALLS.items())
def test_bad_calls_raise_as_in_python_bindings(fake, code, error):
    trt = fake.module
    logger = logger_of(fake)
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


# --- building


def test_progress_is_reported_and_can_stop_the_build(fake, models):
    log = []
    tensorrt_sample.build(fake.module, logger_of(fake), models["compute"], ranges(models["compute"]), log)
    assert (log[0], log[-1]) == ("Building engine", "Building engine")
    assert len(log) == 8


@pytest.mark.parametrize("answer", [False, None, ValueError("boom")])
def test_a_monitor_that_says_no_or_fails_ends_the_build(fake, models, answer):
    class Stop(fake.module.IProgressMonitor):
        def phase_start(self, phase, parent, steps):
            pass

        def step_complete(self, phase, step):
            if isinstance(answer, Exception):
                raise answer
            return answer

        def phase_finish(self, phase):
            pass

    trt, logger = fake.module, logger_of(fake)
    builder = trt.Builder(logger)
    network, config = parsed(trt, logger, builder, models["compute"]), builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, shapes in ranges(models["compute"]).items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    config.progress_monitor = Stop()
    assert builder.build_serialized_network(network, config) is None
    assert fake.escaped == ([answer] if isinstance(answer, Exception) else [])


def test_a_build_without_memory_gives_nothing(models):
    fake = Fake(no_memory_for=frozenset({"build"}))
    logger = logger_of(fake)
    with pytest.raises(ValueError, match="not built"):
        plan_of(fake, models["compute"], logger)
    assert "OutOfMemory" in logger.lines[-1]


def test_the_parser_says_what_is_wrong(models, tmp_path):
    fake = Fake(unsupported=frozenset({"MatMul", "Gemm"}))
    trt, logger = fake.module, logger_of(fake)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert not parser.parse_from_file(str(models["compute"]))
    assert parser.num_errors >= 1
    error = parser.get_error(0)
    assert error.code() == trt.ErrorCode.UNSUPPORTED_NODE
    assert error.node_operator() in ("MatMul", "Gemm")
    assert error.node() >= 0
    assert parser.get_error(parser.num_errors) is None
    assert network.num_inputs == 0
    parser.clear_errors()
    assert not parser.parse_from_file(str(tmp_path / "none.onnx"))
    assert "cannot be found" in parser.get_error(0).desc()
    (tmp_path / "text.onnx").write_bytes(b"not a model")
    assert not parser.parse_from_file(str(tmp_path / "text.onnx"))
    assert parser.get_error(1).code() == trt.ErrorCode.MODEL_DESERIALIZE_FAILED


def write_attention(path):
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, floats, [1, 2, 4, 8]) for name in "qkvy"]
    node = helper.make_node("Attention", [*"qkv"], ["y"], name="attention")
    graph = helper.make_graph([node], "attention", ends[:3], ends[3:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)


def test_attention_in_float32_must_be_made_decomposable(fake, tmp_path, monkeypatch):
    write_attention(tmp_path / "attention.onnx")
    bound = Bound(fake, tmp_path / "attention.onnx")
    assert bound.run()
    np.testing.assert_array_equal(bound.outputs["y"], bound.wanted["y"])
    monkeypatch.setattr(tensorrt_sample, "attentions", lambda library, network: [])
    with pytest.raises(ValueError, match="not built"):
        plan_of(fake, tmp_path / "attention.onnx")


def test_timing_caches_are_bytes_of_one_version(fake):
    trt, logger = fake.module, logger_of(fake)
    config = trt.Builder(logger).create_builder_config()
    assert config.get_timing_cache() is None
    cache = config.create_timing_cache(b"")
    assert config.set_timing_cache(cache, ignore_mismatch=False)
    content = bytes(config.get_timing_cache().serialize())
    assert config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)
    config.create_timing_cache(b"nonsense")
    assert "Failed to deserialize timing cache" in logger.lines[-1]
    fake.version = "11.0.1.0"
    assert not config.set_timing_cache(cache, ignore_mismatch=False)


# --- loading


def test_plans_load_only_where_they_fit(fake, models):
    plan = plan_of(fake, models["compute"])
    for content, other, complaint in (
        (b"no plan", fake, "magicTag"),
        (plan[:-1], fake, "too small"),
        (plan[:20], fake, "damaged header"),
        (plan, Fake(version="11.0.1.0"), "expecting library version 11.0.1.0 got 11.0.0.114"),
        (plan, Fake(sm=(8, 9)), "expecting compute 8.9 got 9.0"),
        (plan, Fake(no_memory_for=frozenset({"load"})), "OutOfMemory"),
    ):
        logger = logger_of(other)
        assert other.module.Runtime(logger).deserialize_cuda_engine(content) is None
        assert complaint in logger.lines[-1]


def test_without_a_driver_nothing_can_be_made():
    fake = Fake(no_driver=True)
    for name in ("Builder", "Runtime"):
        logger = logger_of(fake)
        with pytest.raises(TypeError, match="factory function returned nullptr"):
            getattr(fake.module, name)(logger)
        assert "error: 35" in logger.lines[-1]


# --- running


def test_what_is_not_set_or_does_not_fit_is_refused(bound):
    name, shape = "latents", bound.inputs["latents"].shape
    misplaced = bound.place(bound.inputs[name], shift=64)
    overlapping = {"velocity": bound.inputs["latents"].ctypes.data}
    for arguments, complaint in (
        ({name: 0}, "no address is set"),
        ({name: misplaced.ctypes.data}, "not aligned to 256"),
        ({"nonsense": 256}, "no input or output nonsense"),
        (overlapping, "output velocity lies where inputs do"),
        ({"shapes": {name: (HIGH + 1, *shape[1:])}}, "is not in the profile"),
        ({"shapes": {name: shape[1:]}}, "Error Code 3"),
        ({"shapes": {"velocity": shape}}, "is no input"),
    ):
        bound.logger.lines.clear()
        done = bound.run(**arguments)
        assert complaint in bound.complaint()
        assert not done or "nonsense" in arguments


def test_device_memory_has_to_be_given_and_enough(fake, bound):
    trt, engine = fake.module, bound.loaded.engine
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    for name, value in bound.inputs.items():
        context.set_input_shape(name, value.shape)
    for name, pointer in bound.pointers().items():
        context.set_tensor_address(name, pointer)
    assert not context.execute_async_v3(1)
    assert "no device memory is set" in bound.complaint()
    context.set_device_memory(bound.scratch.ctypes.data, engine.device_memory_size_v2 - 1)
    assert not context.execute_async_v3(1)
    context.set_device_memory(bound.scratch.ctypes.data, engine.device_memory_size_v2)
    assert context.execute_async_v3(1)
    plain = engine.create_execution_context()
    plain.set_device_memory(bound.scratch.ctypes.data, engine.device_memory_size_v2)
    assert "not created with USER_MANAGED" in bound.complaint()


def test_contexts_without_memory_are_none(fake, bound):
    fake.no_memory_for = frozenset({"context"})
    assert bound.loaded.engine.create_execution_context() is None
    assert "OutOfMemory" in bound.complaint()


def test_work_waits_for_its_stream_and_keeps_the_addresses_of_then(fake, bound):
    queued = []
    fake.enqueue = lambda stream, function: queued.append((stream, function))
    assert bound.run(stream=7)
    context = bound.loaded.contexts["last"]
    moved = bound.place(np.zeros_like(bound.outputs["velocity"]))
    context.set_tensor_address("velocity", moved.ctypes.data)
    assert not bound.outputs["velocity"].any()
    ((stream, function),) = queued
    assert stream == 7
    function()
    np.testing.assert_array_equal(bound.outputs["velocity"], bound.wanted["velocity"])
    assert not moved.any()


def test_the_first_call_cannot_be_captured(fake, bound):
    fake.is_capturing = lambda stream: True
    assert not bound.run()
    assert "run once before" in bound.complaint()
    fake.is_capturing = lambda stream: False
    context = bound.loaded.contexts["last"]
    assert context.execute_async_v3(1)
    fake.is_capturing = lambda stream: True
    assert context.execute_async_v3(1)


# --- refitting


def stripped_plan(fake, path, monkeypatch, *flags):
    config = fake.module.IBuilderConfig
    original = config.set_flag

    def set_flag(self, flag):
        for name in flags:
            original(self, getattr(fake.module.BuilderFlag, name))

    with monkeypatch.context() as patch:
        patch.setattr(config, "set_flag", set_flag)
        return plan_of(fake, path)


def test_stripped_plans_run_only_after_refitting(fake, models, monkeypatch):
    path, trt = models["compute"], fake.module
    plan = stripped_plan(fake, path, monkeypatch, "STRIP_PLAN", "REFIT_IDENTICAL")
    assert len(plan) < len(plan_of(fake, path))
    bound = Bound(fake, path, plan)
    assert not bound.run()
    assert "has not been refitted" in bound.complaint()
    refitter = trt.Refitter(bound.loaded.engine, bound.logger)
    assert refitter.get_missing_weights()
    assert not refitter.refit_cuda_engine()
    parser = trt.OnnxParserRefitter(refitter, bound.logger)
    assert not parser.refit_from_file(str(path) + ".gone")
    assert parser.get_error(0).code() == trt.ErrorCode.INVALID_VALUE
    assert parser.refit_from_file(str(path))
    assert refitter.get_missing_weights() == []
    assert refitter.refit_cuda_engine()
    assert bound.run()
    np.testing.assert_array_equal(bound.outputs["velocity"], bound.wanted["velocity"])
    whole = bytes(bound.loaded.engine.serialize())
    assert Bound(fake, path, whole).run()


def test_refitting_with_another_model_fails(fake, models, monkeypatch):
    plan = stripped_plan(fake, models["compute"], monkeypatch, "STRIP_PLAN", "REFIT_IDENTICAL")
    loaded, logger = opened(fake, plan)
    refitter = fake.module.Refitter(loaded.engine, logger)
    parser = fake.module.OnnxParserRefitter(refitter, logger)
    assert not parser.refit_from_file(str(models["forecast"]))
    assert parser.get_error(0).code() == fake.module.ErrorCode.REFIT_FAILED


def test_weights_are_refitted_by_name(fake, models, monkeypatch):
    plan = stripped_plan(fake, models["compute"], monkeypatch, "STRIP_PLAN", "REFIT_IDENTICAL")
    bound = Bound(fake, models["compute"], plan)
    refitter = fake.module.Refitter(bound.loaded.engine, bound.logger)
    model = onnx.load(models["compute"])
    arrays = {t.name: onnx.numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    names = refitter.get_all_weights()
    for name in names:
        weights = fake.module.Weights(fake.module.DataType.FLOAT, arrays[name].ctypes.data, arrays[name].size)
        assert refitter.set_named_weights(name, weights, fake.module.TensorLocation.HOST)
    assert not refitter.set_named_weights("nonsense", weights)
    assert refitter.refit_cuda_engine_async(1)
    assert bound.run()
    changed = fake.module.Weights(arrays[names[0]] + 1)
    assert refitter.set_named_weights(names[0], changed)
    assert not refitter.refit_cuda_engine()
    assert "REFIT_IDENTICAL with other weights" in bound.complaint()


def test_only_refittable_engines_take_a_refitter(fake, bound):
    with pytest.raises(TypeError, match="nullptr"):
        fake.module.Refitter(bound.loaded.engine, bound.logger)


def test_memory_of_a_fake_gpu_can_be_put_behind_pointers(bound, fake):
    class Recording(fake_tensorrt.Memory):
        def __init__(self):
            self.sizes = {}

        def view(self, pointer, size):
            self.sizes[pointer] = size
            return np.frombuffer((ctypes.c_ubyte * size).from_address(pointer), np.uint8)

    fake.memory = Recording()
    assert bound.run()
    for array in (bound.scratch, *bound.inputs.values(), *bound.outputs.values()):
        assert fake.memory.sizes[array.ctypes.data] == array.nbytes
