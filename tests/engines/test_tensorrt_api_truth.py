"""TensorRT 11.0 cannot be loaded here, so that our code's use of it is checked against its API, name by name."""

import ast
import importlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
import tensorrt_api
import tensorrt_properties
from tensorrt_checker import check

ROOT = Path(__file__).parent.parent.parent
SAMPLE = Path(__file__).parent / "tensorrt_sample.py"
RTX = "tensorrt_rtx_bindings"
needs_rtx = pytest.mark.skipif(importlib.util.find_spec(RTX) is None, reason=f"{RTX} is not installed")

ONLY_ENTERPRISE = {  # names that our code uses and TensorRT-RTX lacks, each with the reason why that is right
}


def imports_tensorrt(text):
    names = [a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
    return any(name.split(".")[0] == "tensorrt" for name in names)


def source_files():
    """Files of the package that use TensorRT, and the sample, by path."""
    import cachec

    package = Path(cachec.__file__).parent
    folders = [package / name for name in ("cli", "compiler", "engines", "passes", "runtime")]
    every = [*package.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    found = {str(path.relative_to(package)): path.read_text() for path in sorted(every)}
    ours = {name: text for name, text in found.items() if "tensorrt" in Path(name).stem or imports_tensorrt(text)}
    return {**ours, SAMPLE.name: SAMPLE.read_text()}


SOURCES = source_files()
REPORT = check(SOURCES)


def plant(place):
    """The sources with something that does not exist at one place."""
    what, file, line, column = place
    lines = SOURCES[file].splitlines(keepends=True)
    text = lines[line - 1].encode()
    before, after = text[:column].decode(), text[column:].decode()
    if what == "call":
        inner = before[:-1].rstrip()
        before = f"{inner}{'' if inner.endswith(('(', ',')) or not inner else ', '}not_a_keyword=0)"
        if not inner:  # the bracket stands alone: a trailing comma is before it, or may be put there
            before = "**{'not_a_keyword': 0})" if lines[line - 2].rstrip().endswith((",", "(")) else ", not_a_keyword=0)"
    else:
        before += "_planted"
    lines[line - 1] = before + after
    return {**SOURCES, file: "".join(lines)}


def test_our_code_uses_what_tensorrt_has():
    assert [str(problem) for problem in REPORT.problems] == []


USING = sorted({place[1] for place in REPORT.places})


def test_the_files_that_use_tensorrt_are_known():
    """Others only speak of it: they hold no object of it."""
    parts = [f"engines/tensorrt_{part}.py" for part in ("from_onnx", "library", "run")]
    assert [*parts, SAMPLE.name] == USING


@pytest.mark.parametrize("file", USING)
def test_every_planted_name_and_keyword_is_found(file):
    """At every place where the file uses TensorRT, something that it does not have."""
    places = sorted(place for place in REPORT.places if place[1] == file)
    assert [place for place in places if not check(plant(place)).problems] == []


GIVEN = """
from typing import TYPE_CHECKING, Any
if TYPE_CHECKING:
    import tensorrt as trt

def use(library: Any, builder: "trt.Builder", config: "trt.IBuilderConfig", network: "trt.INetworkDefinition",
        engine: "trt.ICudaEngine", context: "trt.IExecutionContext", parser: "trt.OnnxParser", logger: "trt.ILogger",
        anything: Any) -> None:
"""
WRONG = {
    "config.set_flags(library.BuilderFlag.REFIT)": "no IBuilderConfig.set_flags; did you mean set_flag?",
    "config.set_flag(library.BuilderFlag.FP16)": "no BuilderFlag.FP16",
    "config.set_flag(library.BuilderFlag.__members__['BF16'])": "no BuilderFlag.BF16",
    "config.set_flag(1)": "flag must be BuilderFlag, not int",
    "config.set_flag(library.TensorIOMode.INPUT)": "flag must be BuilderFlag, not TensorIOMode",
    "config.set_flag(library.BuilderFlag(3))": "name a member",
    "config.max_workspace_size = 1": "IBuilderConfig.max_workspace_size is set, but",
    "config.num_optimization_profiles = 1": "cannot be set",
    "config.progress_monitor = logger": "progress_monitor must be IProgressMonitor, not ILogger",
    "config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, size=1)": "keyword size is not one of",
    "config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, 1, pool_size=1)": "keyword pool_size is given twice",
    "config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE)": "lacks ['pool_size']",
    "config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, 1, 2)": "takes 2 arguments, not 3",
    "config.set_memory_pool_limit(*anything)": "called with * or **",
    "config.int8_calibrator": "no IBuilderConfig.int8_calibrator",
    "builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))": "no NetworkDefinitionC",
    "builder.platform_has_fast_fp16": "no Builder.platform_has_fast_fp16",
    "builder.build_engine(network, config)": "no Builder.build_engine; did you mean build_engine_with_config?",
    "builder.build_serialized_network(config, network)": "network must be INetworkDefinition, not IBuilderConfig",
    "len(builder.build_serialized_network(network, config))": "IHostMemory has no length",
    "network.get_input(0).dtype = library.float16": "ITensor.dtype cannot be set",
    "network.get_input(0).dynamic_range = (0, 1)": "ITensor.dynamic_range is set, but",
    "network.get_input(0).shape.dims": "no Dims.dims",
    "network.get_layer(0).precision = library.float16": "ILayer.precision is set, but",
    "network.get_layer(0).attention": "no ILayer.attention",
    "network.num_layers()": "INetworkDefinition.num_layers is a property",
    "print(parser.get_error(0).desc)": "ParserError.desc is a method: call it",
    "parser.get_error(0).description()": "no ParserError.description",
    "parser.get_error(0, 1)": "takes 1 arguments, not 2",
    "parser.get_error()": "lacks ['index']",
    "engine.device_memory_size": "no ICudaEngine.device_memory_size; did you mean device_memory_size_v2?",
    "engine.create_execution_context_without_device_memory()": "no ICudaEngine.create_execution_context_without_device_memory",
    "engine.create_execution_context(library.ExecutionContextAllocationStrategy.USER)": "AllocationStrategy.USER;",
    "engine.create_execution_context().execute_async_v2(0, 0)": "no IExecutionContext.execute_async_v2",
    "engine.num_bindings": "no ICudaEngine.num_bindings",
    "engine.get_binding_name(0)": "no ICudaEngine.get_binding_name",
    "engine.get_tensor_dtype('x').itemsize": "no DataType.itemsize",
    "[mode for mode in library.TensorIOMode]": "TensorIOMode cannot be iterated",
    "with engine.create_execution_context() as entered: pass": "no context manager",
    "context.set_tensor_adress('x', 0)": "did you mean set_tensor_address?",
    "context.set_tensor_address(name='x', address=0)": "keyword address is not one of",
    "context.set_input_shape(0, (1,))": "name must be str, not int",
    "context.all_shape_inputs_specified": "no IExecutionContext.all_shape_inputs_specified",
    "library.init_plugins()": "no init_plugins",
    "library.Runtime()": "lacks ['logger']",
    "library.ICudaEngine()": "cannot be made by hand",
    "library.Logger(library.Logger.WARN)": "no Logger.WARN; did you mean WARNING?",
    "library.float8": "no float8",
    "anything.execute_async_v3(0)": "what anything is, but .execute_async_v3 looks like execute_async_v3 of IExec",
    "anything.native.execute_async_v2(0)": "anything.native is, but .execute_async_v2 looks like execute_async_v3",
    "anything.device_memory_size": "looks like device_memory_size_v2 of ICudaEngine",
    "getattr(config, anything)": "needs a literal",
    "getattr(library.BuilderFlag, 'INT8')": "no BuilderFlag.INT8",
    "getattr(engine, 'device_memory_size')": "no ICudaEngine.device_memory_size",
    "library.get_plugin_registry().get_creators": "annotate what comes from get_plugin_registry",
    "hidden: Any = engine": "a TensorRT object (ICudaEngine) is annotated Any",
    "for layer in [network.get_layer(0)]: layer.kind": "no ILayer.kind",
    "[e.what() for e in (parser.get_error(i) for i in range(2))]": "no ParserError.what",
    "(engine if anything else None).num_tensors": "no ICudaEngine.num_tensors",
    "a, (b, c) = 1, (engine, context); b.num_tensors": "no ICudaEngine.num_tensors",
    "found = {'x': engine}; [e.num_tensors for e in found.values()]": "no ICudaEngine.num_tensors",
    "kept = []; kept.append(engine); kept[0].num_tensors": "no ICudaEngine.num_tensors",
    "(lambda: engine)().num_tensors": "no ICudaEngine.num_tensors",
    "import tensorrt as vendor": "the module tensorrt is called vendor",
    "from tensorrt import Builder": "import the module",
    "hint: 'trt.IEngine' = anything": "no class IEngine",
    "library.Builder = None": "TensorRT's own names stay",
}
WRONG_DEFINITIONS = {
    """
def keep(engine):
    engine.serialize()

def use(library, logger: "trt.ILogger"):
    keep(library.Runtime(logger).deserialize_cuda_engine(b""))
""": 'keep gets a TensorRT object: annotate engine with "trt.ICudaEngine"',
    """
def make(library, logger: "trt.ILogger"):
    return library.Runtime(logger)
""": "a TensorRT object (Runtime) is returned",
    """
class Progress(trt.IProgressMonitor):
    def phase_begin(self, name, parent, steps): ...
""": "no method IProgressMonitor.phase_begin to override",
    """
class Progress(trt.IProgressMonitor):
    def phase_start(self, name, parent): ...
""": "IProgressMonitor.phase_start has 3 parameters after self, the override has 2",
    """
class Log(trt.ILogger):
    def __init__(self):
        self.lines = []
""": "__init__ does not call super().__init__()",
    """
class Log(trt.ILogger):
    def log(self, severity, msg):
        severity.level
""": "no ILogger.Severity.level",
    """
class Log(trt.ILogger): ...

trt.Runtime(trt.Builder(Log()))
""": "logger must be ILogger, not Builder",
    """
class Runner:
    def __init__(self, trt, engine: "trt.ICudaEngine"):
        self.context = engine.create_execution_context()

    def run(self):
        self.context.execute(1)
""": "no IExecutionContext.execute;",
    """
class Runner:
    engine: Any

    def __init__(self, engine: "trt.ICudaEngine"):
        self.engine = engine
""": "put into .engine, which is annotated otherwise",
    """
class Runner:
    engines: "dict[str, trt.ICudaEngine | None]"

    def names(self):
        return [engine.label for engine in self.engines.values()]

    def outer(self):
        def inner():
            return self.engines["x"].title
        return inner
""": "no ICudaEngine.title",
    """
def give(vendor): ...

give(trt)
""": "gets the module as vendor: call it library",
    """
def change(layer: "trt.ILayer"):
    layer.__class__ = trt.IAttentionInputLayer
    layer.attention.decompose = True
""": "IAttention.decompose is set, but",
    """
from typing import cast
def change(thing):
    cast("trt.IAttention", thing).causal_mask
""": "no IAttention.causal_mask",
    """
from contextlib import contextmanager
@contextmanager
def opened(path) -> "Iterator[trt.ICudaEngine]": ...

with opened("x") as engine:
    engine.close()
""": "no ICudaEngine.close",
}


@pytest.mark.parametrize(("line", "message"), WRONG.items())
def test_the_checker_finds_in_a_line(line, message):
    problems = check({"planted.py": f"{GIVEN}    {line}\n"}).problems
    assert any(message in problem.text for problem in problems), list(map(str, problems))


@pytest.mark.parametrize(("text", "message"), WRONG_DEFINITIONS.items())
def test_the_checker_finds_in_definitions(text, message):
    problems = check({"planted.py": text}).problems
    assert any(message in problem.text for problem in problems), list(map(str, problems))


def test_the_checker_follows_calls_into_other_files():
    first = 'def opened(path) -> "trt.ICudaEngine": ...\n'
    second = "from cachec.engines.tensorrt_first import opened\nopened('x').label\n"
    problems = check({"engines/tensorrt_first.py": first, "engines/tensorrt_second.py": second}).problems
    assert [(p.file, p.line) for p in problems] == [("engines/tensorrt_second.py", 2)]


RIGHT = [
    "config.set_flag(library.BuilderFlag.REFIT)",
    "config.flags |= 1 << int(library.BuilderFlag.REFIT)",
    "config.set_flag(library.BuilderFlag.__members__[anything])",
    "network.get_input(0).shape = (1, 2)",
    "for extent in network.get_input(0).shape: extent + 1",
    "[parser.get_error(i).desc().strip() for i in range(parser.num_errors)]",
    "context.set_input_shape('x', tuple(anything.shape)) and context.set_input_shape(name='x', shape=[1])",
    "engine.create_execution_context(strategy=library.ExecutionContextAllocationStrategy.STATIC)",
    "anything.engine.name, anything.shape, anything.read_text()",
    "found = None\n    found = engine if anything else found\n    found is None or found.refittable",
    "library.__version__.split('.')",
    "library.Logger(library.Logger.WARNING).min_severity == library.ILogger.Severity.ERROR",
    "modes = {'x': library.TensorIOMode.INPUT}; modes['x'].name.lower()",
]


@pytest.mark.parametrize("line", RIGHT)
def test_the_checker_leaves_alone(line):
    assert check({"right.py": f"{GIVEN}    {line}\n"}).problems == ()


@needs_rtx
@pytest.mark.parametrize("name", sorted(REPORT.used))
def test_tensorrt_rtx_has_the_name_too(name):
    """The module that the same code is tried on, on machines without TensorRT."""
    value = importlib.import_module(RTX)
    for part in name.split("."):
        has = hasattr(value, part)
        assert has != (name in ONLY_ENTERPRISE), f"{name} is {'' if has else 'not '}in {RTX}"
        if not has:
            return
        value = getattr(value, part)


def test_the_list_of_differences_holds_only_what_is_used():
    assert set(ONLY_ENTERPRISE) <= REPORT.used


@needs_rtx
def test_types_of_properties_are_those_of_the_installed_library():
    kept = json.loads(tensorrt_properties.FILE.read_text())
    if importlib.metadata.version("tensorrt_rtx_cu13_bindings") not in kept["source"]:
        pytest.skip("another version is installed than the file was made with")
    assert kept["properties"] == tensorrt_properties.introspect(importlib.import_module(RTX))


def test_the_api_file_is_read_whole():
    api = tensorrt_api.load()
    assert api.source.startswith("tensorrt-cu13-bindings 11.0")
    assert api.classes["Logger"].properties["ERROR"] == ("ILogger.Severity", False)
    assert api.classes["DimsHW"].methods["__getitem__"][0].returns == "int"  # of Dims, two classes up
    assert [p.name for p in api.classes["INetworkDefinition"].methods["add_scale_nd"][0].parameters][-1] == "channel_axis"
    assert not {"FP16", "INT8"} & set(api.classes["BuilderFlag"].enum)
