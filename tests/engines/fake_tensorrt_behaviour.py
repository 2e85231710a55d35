"""What the fake TensorRT does to build: loggers, networks, the ONNX parser, configurations, the builder and its plans.

A plan is a magic word, a line of JSON, and the ONNX model that it computes, with its weights unless it is stripped.
Messages and odd results are those of TensorRT-RTX 1.7, as far as that could be tried without a GPU.
"""

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fake_tensorrt import METHODS, READS, WRITES, Fake, facts_of
from onnx import TensorProto

MAGIC = b"FAKEPLAN\n"
CACHE = b"FAKECACHE\n"
TYPES = {  # of ONNX, as TensorRT calls them; there is no double
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
}
LAYERS = {"Attention": "ATTENTION_INPUT", "MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY", "Softmax": "SOFTMAX"}
PHASES = {"Preparing graph for optimization": 2, "Optimizing graph": 3, "Building engine from subgraph": 2}  # with steps
LATEST_OPSET = 25
MAX_LEVEL = 5
SCRATCH_PER_LAYER = 1024  # bytes


def does(name, key):
    return lambda function: METHODS.setdefault((name, key), function)


def reads(name, key):
    return lambda function: READS.setdefault((name, key), function)


def host_memory(fake: Fake, content: bytes) -> Any:
    """An ``IHostMemory``: a buffer without a length of its own, as TensorRT's."""
    base = fake.module.IHostMemory
    array = ctypes.c_ubyte * len(content)
    cls = type(
        "IHostMemory", (base, array), {"__len__": None, "__getitem__": None, "__iter__": None, "__init__": array.__init__}
    )
    made = cls()
    ctypes.memmove(made, content, len(content))
    object.__setattr__(made, "_facts", {"nbytes": len(content), "dtype": fake.module.DataType.INT8})
    return made


# --- small things


@does("Logger", "__init__")
def make_logger(_fake, self, severity):
    facts_of(self)["min_severity"] = severity


@does("Logger", "log")
def log(_fake, self, severity, text):
    if severity.value <= facts_of(self)["min_severity"].value:
        print(f"[TRT] [{severity.name}] {text}")


@does("ILogger", "log")
def log_nowhere(_fake, _self, _severity, _text):
    raise RuntimeError("tried to call the pure virtual function ILogger::log: override it")


@does("Dims", "__init__")
def make_dims(_fake, self, shape=()):
    facts_of(self)["shape"] = tuple(int(extent) for extent in shape)


@does("Dims", "__len__")
def length(_fake, self):
    return len(facts_of(self)["shape"])


@does("Dims", "__getitem__")
def extent_of(_fake, self, index):
    return facts_of(self)["shape"][index if isinstance(index, slice) else int(index)]


# --- networks and the parser


@does("Builder", "__init__")
def make_builder(fake, self, logger):
    if fake.no_driver:
        fake.log(logger, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")
    facts_of(self).update(logger=logger, max_threads=1, num_DLA_cores=0, error_recorder=None)


@does("Builder", "create_network")
def create_network(fake, self, flags):
    return fake.new(
        "INetworkDefinition", builder=self, name="Unnamed Network 0", flags=flags, model=None, inputs=[], outputs=[], layers=[]
    )


for plural in ("inputs", "outputs", "layers"):
    reads("INetworkDefinition", f"num_{plural}")(lambda _fake, self, plural=plural: len(facts_of(self)[plural]))

    def at(fake, self, index, plural=plural):
        found = facts_of(self)[plural]
        if 0 <= index < len(found):
            return found[index]
        fake.log(facts_of(facts_of(self)["builder"])["logger"], f"INetworkDefinition: invalid index {index} of {plural}")
        return None

    does("INetworkDefinition", f"get_{plural[:-1]}")(at)


for owner, side in (("ILayer", "input"), ("ILayer", "output"), ("IAttention", "input")):

    def tensor_at(fake, self, index, side=side):
        return fake.new("ITensor", name=facts_of(self)["takes" if side == "input" else "gives"][index])

    does(owner, f"get_{side}")(tensor_at)


@reads("IAttentionBoundaryLayer", "attention")
def attention_of(_fake, self):
    return facts_of(self)["of"]


@does("OnnxParser", "__init__")
def make_parser(_fake, self, network, logger):
    facts_of(self).update(network=network, logger=logger, errors=[])


@reads("OnnxParser", "num_errors")
@reads("OnnxParserRefitter", "num_errors")
def num_errors(_fake, self):
    return len(facts_of(self)["errors"])


@does("OnnxParser", "get_error")
@does("OnnxParserRefitter", "get_error")
def get_error(_fake, self, index):
    errors = facts_of(self)["errors"]
    return errors[index] if 0 <= index < len(errors) else None


for part in ("desc", "node", "node_name", "node_operator"):
    does("ParserError", part)(lambda _fake, self, part=part: facts_of(self)[part])


def parser_error(fake: Fake, self: Any, code: str, text: str, *, node: int = -1, name: str = "", operator: str = "") -> bool:
    """Keep an error, tell the logger, and be false."""
    facts = {"desc": text, "node": node, "node_name": name, "node_operator": operator}
    facts_of(self)["errors"].append(fake.new("ParserError", **facts))
    fake.log(facts_of(self)["logger"], f"In node {node} with name: {name} and operator: {operator}: {code}: {text}")
    return False


def read_model(fake: Fake, self: Any, path: str) -> onnx.ModelProto | None:
    """The model with its weights; ``None`` after an error was kept."""
    if not Path(path).is_file():
        parser_error(fake, self, "INVALID_VALUE", f"Input file cannot be found, or is not a regular file: {path}")
        return None
    try:
        model = onnx.load(path)
        onnx.checker.check_model(path)
    except Exception as error:  # as TensorRT: whatever is wrong with the file is an error of the parser
        parser_error(fake, self, "MODEL_DESERIALIZE_FAILED", f"Failed to parse the ONNX model: {error}")
        return None
    return model


@does("OnnxParser", "parse_from_file")
def parse_from_file(fake, self, path):
    model = read_model(fake, self, path)
    return model is not None and take_model(fake, self, model, path)


def take_model(fake: Fake, self: Any, model: onnx.ModelProto, path: str) -> bool:
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset > LATEST_OPSET:
        return parser_error(fake, self, "UNSUPPORTED_GRAPH", f"opset {opset} is newer than {LATEST_OPSET}")
    for place, node in enumerate(model.graph.node):
        if node.op_type in fake.unsupported:
            text = "Plugin not found, are the plugin name, version, and namespace correct?"
            parser_error(fake, self, "UNSUPPORTED_NODE", text, node=place, name=node.name, operator=node.op_type)
    initializers = {one.name for one in model.graph.initializer}
    ends = {
        "inputs": [value for value in model.graph.input if value.name not in initializers],
        "outputs": [*model.graph.output],
    }
    for value in (*ends["inputs"], *ends["outputs"]):
        if value.type.tensor_type.elem_type not in TYPES:
            text = f"{value.name} has a type that TensorRT lacks: {TensorProto.DataType.Name(value.type.tensor_type.elem_type)}"
            parser_error(fake, self, "UNSUPPORTED_NODE_DATATYPE", text)
    if facts_of(self)["errors"]:
        return False
    network = facts_of(facts_of(self)["network"])
    network.update(model=model, path=path, layers=[layer(fake, model, node) for node in model.graph.node])
    for plural, values in ends.items():
        network[plural] = [tensor(fake, value, is_input=plural == "inputs") for value in values]
    return True


def tensor(fake: Fake, value: onnx.ValueInfoProto, *, is_input: bool) -> Any:
    """An ``ITensor``; what is symbolic is -1."""
    kind = value.type.tensor_type
    shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
    return fake.new(
        "ITensor",
        name=value.name,
        dtype=getattr(fake.module.DataType, TYPES[kind.elem_type]),
        shape=fake.module.Dims(shape),
        symbols=[dim.dim_param for dim in kind.shape.dim],
        is_network_input=is_input,
        is_network_output=not is_input,
        is_shape_tensor=False,
        is_execution_tensor=True,
    )


def layer(fake: Fake, model: onnx.ModelProto, node: onnx.NodeProto) -> Any:
    """An ``ILayer``. As TensorRT does, attention comes as one that has yet to be made an ``IAttentionInputLayer``."""
    kind = getattr(fake.module.LayerType, LAYERS.get(node.op_type, "ELEMENTWISE"))
    made = fake.new(
        "ILayer", name=node.name or node.output[0], type=kind, num_inputs=len(node.input), num_outputs=len(node.output)
    )
    if node.op_type == "Attention":
        wide = TensorProto.FLOAT in types_at(model, node)
        facts_of(made)["of"] = fake.new("IAttention", name=node.name, decomposable=False, float32=wide, mask=None)
        facts_of(facts_of(made)["of"])["takes"] = list(node.input)
    operation = getattr(fake.module.ElementWiseOperation, "PROD" if node.op_type == "Mul" else "SUM")  # of an ELEMENTWISE one
    facts_of(made).update(takes=list(node.input), gives=list(node.output), op=operation)
    return made


def types_at(model: onnx.ModelProto, node: onnx.NodeProto) -> set[int]:
    """Element types of what a node reads and writes; of the weights where the file does not say."""
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    known = {value.name: value.type.tensor_type.elem_type for value in values}
    found = {known[name] for name in (*node.input, *node.output) if name in known}
    return found or {weights.data_type for weights in model.graph.initializer}


# --- configurations


@does("Builder", "create_builder_config")
def create_builder_config(fake, self):
    named = {
        "hardware_compatibility_level": fake.module.HardwareCompatibilityLevel.NONE,
        "profiling_verbosity": fake.module.ProfilingVerbosity.LAYER_NAMES_ONLY,
        "tiling_optimization_level": fake.module.TilingOptimizationLevel.NONE,
        "runtime_platform": fake.module.RuntimePlatform.SAME_AS_BUILD,
    }
    return fake.new(
        "IBuilderConfig",
        logger=facts_of(self)["logger"],
        flags=1 << fake.module.BuilderFlag.TF32.value,
        builder_optimization_level=3,
        max_aux_streams=-1,
        avg_timing_iterations=1,
        max_num_tactics=-1,
        l2_limit_for_tiling=-1,
        progress_monitor=None,
        profile_stream=0,
        profiles=[],
        pools={},
        cache=None,
        **named,
    )


def limit_level(_fake, _self, level):
    return min(int(level), MAX_LEVEL)


WRITES["IBuilderConfig", "builder_optimization_level"] = limit_level


@does("IBuilderConfig", "set_flag")
def set_flag(_fake, self, flag):
    facts_of(self)["flags"] |= 1 << flag.value


@does("IBuilderConfig", "clear_flag")
def clear_flag(_fake, self, flag):
    facts_of(self)["flags"] &= ~(1 << flag.value)


@does("IBuilderConfig", "set_memory_pool_limit")
def set_memory_pool_limit(_fake, self, pool, size):
    facts_of(self)["pools"][pool] = int(size)


@does("IBuilderConfig", "set_preview_feature")
def set_preview_feature(_fake, self, feature, enable):
    facts_of(self).setdefault("previews", {})[feature.name] = enable


@does("IBuilderConfig", "create_timing_cache")
def create_timing_cache(fake, self, content):
    content = bytes(content)
    entries = {}
    header = {"version": fake.version, "sm": list(fake.sm)}
    if content.startswith(CACHE):
        kept = json.loads(content[len(CACHE) :])
        header, entries = kept["header"], kept["entries"]
    elif content:
        fake.log(facts_of(self)["logger"], "Failed to deserialize timing cache. Returning an empty timing cache.", "WARNING")
    return fake.new("ITimingCache", header=header, entries=entries)


@does("IBuilderConfig", "set_timing_cache")
def set_timing_cache(fake, self, cache, ignore_mismatch):
    if facts_of(cache)["header"] != {"version": fake.version, "sm": list(fake.sm)} and not ignore_mismatch:
        fake.log(facts_of(self)["logger"], "The timing cache is of another version or device", "WARNING")
        return False
    facts_of(self)["cache"] = cache
    return True


@does("IBuilderConfig", "get_timing_cache")
def get_timing_cache(_fake, self):
    return facts_of(self)["cache"]


@does("ITimingCache", "serialize")
def serialize_cache(fake, self):
    kept = {"header": facts_of(self)["header"], "entries": facts_of(self)["entries"]}
    return host_memory(fake, CACHE + json.dumps(kept).encode())


@does("Builder", "create_optimization_profile")
def create_optimization_profile(fake, _self):
    return fake.new("IOptimizationProfile", shapes={}, extra_memory_target=1.0)


@does("IOptimizationProfile", "set_shape")
def set_shape(_fake, self, name, low, usual, high):
    """Says nothing about nonsense: adding the profile does."""
    facts_of(self)["shapes"][name] = (tuple(low), tuple(usual), tuple(high))


@does("IBuilderConfig", "add_optimization_profile")
def add_optimization_profile(fake, self, profile):
    for name, ranges in facts_of(profile)["shapes"].items():
        ordered = len({len(shape) for shape in ranges}) == 1 and all(a <= b <= c for a, b, c in zip(*ranges, strict=True))
        if not ordered or any(extent < 0 for shape in ranges for extent in shape):
            text = f"Invalid optimization profiles for input tensors {name}, please ensure that they satisfy MIN<=OPT<=MAX"
            fake.log(facts_of(self)["logger"], text)
            return -1
    facts_of(self)["profiles"].append(profile)
    return len(facts_of(self)["profiles"]) - 1


# --- the builder


@does("Builder", "build_serialized_network")
def build_serialized_network(fake, self, network, config, _kernel_text=None):
    logger = facts_of(self)["logger"]
    for reason in reasons_against(fake, network, config):
        fake.log(logger, f"IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error ({reason})")
        return None
    if "build" in fake.no_memory_for:
        fake.log(logger, "Error Code 2: OutOfMemory (Requested size was 1234567890 bytes.)")
        return None
    monitor = facts_of(config)["progress_monitor"]
    if monitor is not None and not report_progress(fake, monitor):
        return None
    cache = facts_of(config)["cache"]
    if cache is not None:
        facts_of(cache)["entries"].update({made.name: "tactic" for made in facts_of(network)["layers"]})
    return host_memory(fake, make_plan(fake, network, config))


def reasons_against(fake: Fake, network: Any, config: Any) -> list[str]:
    net, profiles = facts_of(network), facts_of(config)["profiles"]
    if not net["outputs"]:
        return ["Network must have at least one output."]
    dynamic = {made.name: tuple(made.shape) for made in net["inputs"] if -1 in tuple(made.shape)}
    if dynamic and not profiles:
        return ["Network has dynamic or shape inputs, but no optimization profile has been defined."]
    found = []
    inputs = {made.name: tuple(made.shape) for made in net["inputs"]}
    for profile in profiles:
        shapes = facts_of(profile)["shapes"]
        found += [f"profile for {name}, which is no input" for name in shapes if name not in inputs]
        found += [f"no profile for the dynamic input {name}" for name in dynamic if name not in shapes]
        found += [
            f"profile {shape} does not fit {name} {inputs[name]}"
            for name, ranges in shapes.items()
            for shape in ranges
            if name in inputs and not fits(inputs[name], shape)
        ]
    wide = [made.name for made in net["layers"] if "of" in facts_of(made) and facts_of(facts_of(made)["of"])["float32"]]
    fused = [made for made in net["layers"] if made.name in wide and not facts_of(facts_of(made)["of"])["decomposable"]]
    found += [f"Attention operation was not supported by a dedicated kernel: {made.name}" for made in fused]
    return found + [f"the fake computes no bfloat16: {made.name}" for made in net["inputs"] if made.dtype.name == "BF16"]


def fits(symbolic: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(symbolic) == len(shape) and all(want in (-1, got) for want, got in zip(symbolic, shape, strict=True))


def report_progress(fake: Fake, monitor: Any) -> bool:
    """Call the monitor as TensorRT does; exceptions in it do not come out, they end the build."""

    def tell(method: str, *values: Any) -> Any:
        try:
            return getattr(monitor, method)(*values)
        except BaseException as error:  # as TensorRT, which prints it
            fake.escaped.append(error)
            return False

    outer = "Building engine"
    tell("phase_start", outer, None, len(PHASES))
    goes_on = True
    for number, (phase, steps) in enumerate(PHASES.items()):
        tell("phase_start", phase, outer, steps)
        for step in range(steps):
            goes_on = goes_on and bool(tell("step_complete", phase, step))
        tell("phase_finish", phase)
        goes_on = goes_on and bool(tell("step_complete", outer, number))
        if not goes_on:
            break
    tell("phase_finish", outer)
    return goes_on


def make_plan(fake: Fake, network: Any, config: Any) -> bytes:
    net, settings = facts_of(network), facts_of(config)
    flags = [name for name, flag in fake.module.BuilderFlag.__members__.items() if settings["flags"] >> flag.value & 1]
    refit = sorted(flag for flag in flags if flag.startswith("REFIT"))
    model = onnx.ModelProto()
    model.CopyFrom(net["model"])
    header = {
        "version": fake.version,
        "sm": list(fake.sm),
        "onnx": net["path"],
        "io": [describe(made) for made in (*net["inputs"], *net["outputs"])],
        "profiles": [facts_of(profile)["shapes"] for profile in settings["profiles"]] or [{}],
        "flags": flags,
        "refit": refit,
        "level": settings["builder_optimization_level"],
        "compatible": settings["hardware_compatibility_level"].name,
        "verbosity": settings["profiling_verbosity"].name,
        "layers": len(net["layers"]),
        "scratch": SCRATCH_PER_LAYER * len(net["layers"]),
        "resizes": settings.get("previews", {}).get("RUNTIME_ACTIVATION_RESIZE_10_10", False),
        "weights": {name: hash_of(weights) for name, weights in weights_of(model).items()},
        "stripped": "STRIP_PLAN" in flags,
    }
    return serialize_plan(header, strip(model) if header["stripped"] else model)


def describe(made: Any) -> dict[str, Any]:
    mode = "INPUT" if made.is_network_input else "OUTPUT"
    return {
        "name": made.name,
        "mode": mode,
        "dtype": made.dtype.name,
        "shape": tuple(made.shape),
        "symbols": facts_of(made)["symbols"],
    }


def serialize_plan(header: dict[str, Any], model: onnx.ModelProto) -> bytes:
    content = model.SerializeToString()
    return MAGIC + json.dumps({**header, "size": len(content)}).encode() + b"\n" + content


def weights_of(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """What refitting replaces: all but the integers that are shapes and indices."""
    return {t.name: t for t in model.graph.initializer if TYPES.get(t.data_type) in ("FLOAT", "HALF", "BF16")}


def hash_of(weights: onnx.TensorProto) -> str:
    return hashlib.sha256(np.ascontiguousarray(onnx.numpy_helper.to_array(weights)).tobytes()).hexdigest()


def strip(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model without its weights."""
    for weights in weights_of(model).values():
        for place in ("raw_data", "float_data", "int32_data"):
            weights.ClearField(place)
    return model
