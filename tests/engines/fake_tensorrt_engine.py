"""What the fake TensorRT does to run: plans are loaded, refitted, executed, and all that TensorRT demands is checked.

What fails does as TensorRT does: it tells the logger, and returns ``False`` or ``None``.
"""

import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_tensorrt import DTYPES, Fake, facts_of
from fake_tensorrt_behaviour import (
    MAGIC,
    does,
    fits,
    hash_of,
    parser_error,
    read_model,
    weights_of,
)

from cachec.engines import ort

ALIGNMENT = 256  # bytes; of every address
DIRT = 0xAB  # left in scratch memory, so that what lies there by mistake is lost


def fail(fake: Fake, self: Any, text: str, result: Any = False) -> Any:
    fake.log(facts_of(self)["logger"], text)
    return result


# --- loading


@does("Runtime", "__init__")
def make_runtime(fake, self, logger):
    if fake.no_driver:
        fake.log(logger, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")
    facts_of(self).update(logger=logger, engine_host_code_allowed=False, max_threads=1, error_recorder=None)


@does("Runtime", "deserialize_cuda_engine")
def deserialize_cuda_engine(fake, self, content):
    content = bytes(content)
    if not content.startswith(MAGIC):
        return fail(fake, self, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magicTag does not match)", None)
    head, _, body = content[len(MAGIC) :].partition(b"\n")
    try:
        plan = json.loads(head)
    except ValueError:
        return fail(fake, self, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (damaged header)", None)
    if len(body) != plan["size"]:
        return fail(fake, self, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (bufferSize is too small)", None)
    reason = reason_not_here(fake, self, plan)
    if reason:
        return fail(fake, self, f"IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error ({reason})", None)
    if "load" in fake.no_memory_for:
        return fail(fake, self, "IRuntime::deserializeCudaEngine: Error Code 2: OutOfMemory", None)
    return make_engine(fake, facts_of(self)["logger"], plan, onnx.load_from_string(body))


def reason_not_here(fake: Fake, self: Any, plan: dict[str, Any]) -> str | None:
    """Why a plan does not run in this version or on this device."""
    lean = "VERSION_COMPATIBLE" in plan["flags"] and plan["version"].split(".")[0] == fake.version.split(".")[0]
    if plan["version"] != fake.version and not (lean and facts_of(self)["engine_host_code_allowed"]):
        return (
            "The engine plan file is not compatible with this version of TensorRT, expecting library version "
            f"{fake.version} got {plan['version']}, please rebuild."
        )
    same_family = plan["compatible"] == "AMPERE_PLUS" and min(tuple(plan["sm"]), fake.sm) >= (8, 0)
    if tuple(plan["sm"]) != fake.sm and not same_family:
        here, there = (".".join(map(str, sm)) for sm in (fake.sm, plan["sm"]))
        return f"The engine plan file is generated on an incompatible device, expecting compute {here} got {there}, rebuild."
    return None


def make_engine(fake: Fake, logger: Any, plan: dict[str, Any], model: onnx.ModelProto) -> Any:
    return fake.new(
        "ICudaEngine",
        logger=logger,
        plan=plan,
        model=model,
        io={entry["name"]: entry for entry in plan["io"]},
        session=None,
        name=model.graph.name,
        num_io_tensors=len(plan["io"]),
        num_layers=plan["layers"],
        num_optimization_profiles=len(plan["profiles"]),
        num_aux_streams=0,
        refittable=bool(plan["refit"]),
        device_memory_size_v2=plan["scratch"],
        hardware_compatibility_level=getattr(fake.module.HardwareCompatibilityLevel, plan["compatible"]),
        profiling_verbosity=getattr(fake.module.ProfilingVerbosity, plan["verbosity"]),
        streamable_weights_size=0,
        error_recorder=None,
    )


# --- what engines tell


@does("ICudaEngine", "get_tensor_name")
def get_tensor_name(fake, self, index):
    entries = facts_of(self)["plan"]["io"]
    return entries[index]["name"] if 0 <= index < len(entries) else fail(fake, self, f"there is no tensor {index}", None)


def entry_of(fake: Fake, engine: Any, name: str) -> dict[str, Any] | None:
    found = facts_of(engine)["io"].get(name)
    return found or fail(fake, engine, f"ICudaEngine: Error Code 3: there is no input or output {name}", None)


@does("ICudaEngine", "get_tensor_mode")
def get_tensor_mode(fake, self, name):
    entry = entry_of(fake, self, name)
    return getattr(fake.module.TensorIOMode, entry["mode"] if entry else "NONE")


@does("ICudaEngine", "get_tensor_dtype")
def get_tensor_dtype(fake, self, name):
    entry = entry_of(fake, self, name)
    return getattr(fake.module.DataType, entry["dtype"] if entry else "FLOAT")


@does("ICudaEngine", "get_tensor_shape")
def get_tensor_shape(fake, self, name):
    entry = entry_of(fake, self, name)
    return fake.module.Dims(entry["shape"] if entry else [])


def profile_of(engine: Any, name: str, index: int) -> list[Any]:
    """The smallest, usual and largest shape of an input."""
    plan, entry = facts_of(engine)["plan"], facts_of(engine)["io"][name]
    return plan["profiles"][index].get(name) or [entry["shape"]] * 3


# --- refitting


@does("Refitter", "__init__")
def make_refitter(fake, self, engine, logger):
    facts_of(self).update(engine=engine, logger=logger, given={}, max_threads=1, weights_validation=True)
    if not engine.refittable:
        fail(fake, self, "createInferRefitter: Error Code 3: the engine was not built with the REFIT flag")
        raise TypeError("pybind11::init(): factory function returned nullptr")


@does("Refitter", "get_missing_weights")
def get_missing_weights(_fake, self):
    return [name for name in missing(facts_of(self)["engine"]) if name not in facts_of(self)["given"]]


def missing(engine: Any) -> list[str]:
    """Weights that a stripped plan has not been given yet."""
    held = weights_of(facts_of(engine)["model"])
    return [name for name, weights in held.items() if np.prod(weights.dims) and not has_data(weights)]


def has_data(weights: onnx.TensorProto) -> bool:
    return bool(weights.raw_data or weights.float_data or weights.int32_data)


@does("Refitter", "refit_cuda_engine")
def refit_cuda_engine(fake, self):
    facts = facts_of(self)
    engine = facts_of(facts["engine"])
    lacking = get_missing_weights(fake, self)
    if lacking:
        return fail(fake, self, f"Error Code 4: missing weights: {', '.join(lacking[:3])}")
    if engine["plan"]["refit"] == ["REFIT_IDENTICAL"]:
        other = [name for name, weights in facts["given"].items() if hash_of(weights) != engine["plan"]["weights"][name]]
        if other:  # TensorRT does not look: its results would then be undefined
            return fail(fake, self, f"REFIT_IDENTICAL with other weights than it was built with: {', '.join(other[:3])}")
    for weights in engine["model"].graph.initializer:
        if weights.name in facts["given"]:
            weights.CopyFrom(facts["given"][weights.name])
    engine["session"] = None
    return True


@does("OnnxParserRefitter", "__init__")
def make_parser_refitter(_fake, self, refitter, logger):
    facts_of(self).update(refitter=refitter, logger=logger, errors=[])


@does("OnnxParserRefitter", "refit_from_file")
def refit_from_file(fake, self, path):
    """Sets what the plan can be refitted with; the refitter then does it."""
    model = read_model(fake, self, path)
    if model is None:
        return False
    refitter = facts_of(self)["refitter"]
    given = weights_of(model)
    for name in facts_of(facts_of(refitter)["engine"])["plan"]["weights"]:
        if name not in given:
            return parser_error(fake, self, "REFIT_FAILED", f"the model has no initializer {name}", name=name)
        facts_of(refitter)["given"][name] = given[name]
    return True


# --- contexts


@does("ICudaEngine", "create_execution_context")
def create_execution_context(fake, self, strategy):
    if "context" in fake.no_memory_for:
        return fail(
            fake, self, "IExecutionContext::IExecutionContext: Error Code 2: OutOfMemory (Requested size was 123 bytes.)", None
        )
    entries = facts_of(self)["plan"]["io"]
    return fake.new(
        "IExecutionContext",
        engine=self,
        logger=facts_of(self)["logger"],
        name="",
        strategy=strategy.name,
        shapes={e["name"]: tuple(e["shape"]) for e in entries if e["mode"] == "INPUT" and -1 not in e["shape"]},
        addresses={},
        scratch=None,
        needed=facts_of(self)["plan"]["scratch"],
        active_optimization_profile=0,
        warm=False,
        enqueue_emits_profile=True,
        persistent_cache_limit=0,
    )


@does("IExecutionContext", "set_input_shape")
def set_input_shape(fake, self, name, shape):
    facts, shape = facts_of(self), tuple(int(extent) for extent in shape)
    entry = entry_of(fake, facts["engine"], name)
    if entry is None or entry["mode"] != "INPUT":
        return fail(fake, self, f"IExecutionContext::setInputShape: Error Code 3: {name} is no input")
    if not fits(tuple(entry["shape"]), shape):
        return fail(fake, self, f"IExecutionContext::setInputShape: Error Code 3: {name} is {entry['shape']}, not {shape}")
    low, _, high = profile_of(facts["engine"], name, facts["active_optimization_profile"])
    if any(not a <= extent <= b for a, extent, b in zip(low, shape, high, strict=True)):
        return fail(fake, self, f"setInputShape: Error Code 3: {name} {shape} is not in the profile from {low} to {high}")
    if facts["shapes"].get(name) != shape:
        facts["warm"] = False
        facts["needed"] = facts["engine"].device_memory_size_v2
    facts["shapes"][name] = shape
    return True


def inputs_of(context: Any) -> list[dict[str, Any]]:
    return [entry for entry in facts_of(facts_of(context)["engine"])["plan"]["io"] if entry["mode"] == "INPUT"]


@does("IExecutionContext", "infer_shapes")
def infer_shapes(_fake, self):
    return [entry["name"] for entry in inputs_of(self) if entry["name"] not in facts_of(self)["shapes"]]


@does("IExecutionContext", "get_tensor_shape")
def get_shape_in_context(fake, self, name):
    """Of an input as set; of an output as far as the symbols of the inputs tell. -1 is not known."""
    facts = facts_of(self)
    entry = entry_of(fake, facts["engine"], name)
    if entry is None:
        return fake.module.Dims([])
    if entry["mode"] == "INPUT":
        return fake.module.Dims(facts["shapes"].get(name, entry["shape"]))
    sizes = {}
    for given in inputs_of(self):
        sizes.update(zip(given["symbols"], facts["shapes"].get(given["name"], given["shape"]), strict=True))
    extents = zip(entry["shape"], entry["symbols"], strict=True)
    return fake.module.Dims([sizes.get(symbol, -1) if extent == -1 else extent for extent, symbol in extents])


@does("IExecutionContext", "set_tensor_address")
def set_tensor_address(fake, self, name, pointer):
    if entry_of(fake, facts_of(self)["engine"], name) is None:
        return False
    if int(pointer) % ALIGNMENT:
        return fail(fake, self, f"setTensorAddress: {name} at {int(pointer):#x} is not aligned to {ALIGNMENT} bytes")
    facts_of(self)["addresses"][name] = int(pointer)
    return True


@does("IExecutionContext", "set_device_memory")
def set_device_memory(fake, self, pointer, size):
    facts = facts_of(self)
    wanted = facts["needed"]
    if facts["strategy"] != "USER_MANAGED":
        fail(fake, self, "setDeviceMemoryV2: Error Code 3: the context was not created with USER_MANAGED memory")
    elif int(pointer) % ALIGNMENT or int(size) < wanted:
        fail(
            fake,
            self,
            f"setDeviceMemoryV2: Error Code 3: {size} bytes at {int(pointer):#x}, but {wanted} aligned ones are needed",
        )
    else:
        facts["scratch"] = (int(pointer), wanted)


@does("IExecutionContext", "update_device_memory_size_for_shapes")
def update_device_memory_size_for_shapes(fake, self):
    """Shrinks with the shapes, if the engine was built to; memory that was given before has to be given again."""
    if infer_shapes(fake, self):
        return fail(fake, self, "not all shapes are set", 0)
    facts, plan = facts_of(self), facts_of(facts_of(self)["engine"])["plan"]
    if plan["resizes"]:
        most = [profile_of(facts["engine"], name, facts["active_optimization_profile"])[2] for name in facts["shapes"]]
        here, there = (sum(int(np.prod(shape)) for shape in shapes) for shapes in (facts["shapes"].values(), most))
        facts["needed"] = -(-plan["scratch"] * here // there)
        facts["scratch"] = None
    return facts["needed"]


@does("IExecutionContext", "execute_async_v3")
def execute_async_v3(fake, self, stream):
    facts = facts_of(self)
    reason = reason_not_to_run(fake, self, int(stream))
    if reason:
        return fail(fake, self, f"IExecutionContext::enqueueV3: Error Code 3: API Usage Error ({reason})")
    if not int(stream):
        fake.log(facts["logger"], "Using default stream in enqueueV3() may lead to performance issues", "WARNING")
    shapes, addresses, engine, scratch = dict(facts["shapes"]), dict(facts["addresses"]), facts["engine"], facts["scratch"]
    fake.enqueue(int(stream), lambda: compute(fake, engine, shapes, addresses, scratch))
    facts["warm"] = True
    return True


def reason_not_to_run(fake: Fake, self: Any, stream: int) -> str | None:
    facts = facts_of(self)
    engine = facts_of(facts["engine"])
    unset = [name for name in engine["io"] if not facts["addresses"].get(name)]
    inputs = {
        e["name"]: (facts["addresses"].get(e["name"], 0), size_of(e, facts["shapes"].get(e["name"], ())))
        for e in inputs_of(self)
    }
    if missing(facts["engine"]):
        return "the engine was stripped and has not been refitted"
    if infer_shapes(fake, self):
        return f"no shape is set for {infer_shapes(fake, self)}"
    if unset:
        return f"no address is set for {unset}"
    if facts["strategy"] == "USER_MANAGED" and facts["needed"] and not facts["scratch"]:
        return "no device memory is set"
    if facts["scratch"] is not None and facts["scratch"][1] < facts["needed"]:
        return f"{facts['scratch'][1]} bytes of device memory are set, {facts['needed']} are needed for these shapes"
    if fake.is_capturing(stream) and not facts["warm"]:
        return "the first call after a change of shape cannot be captured: run once before"
    for name, entry in engine["io"].items():
        if entry["mode"] == "OUTPUT":
            begin = facts["addresses"][name]
            size = size_of(entry, tuple(get_shape_in_context(fake, self, name)))
            over = [
                given for given, (other, length) in inputs.items() if begin < other + length and other < begin + max(size, 1)
            ]
            if over:
                return f"output {name} lies where inputs do: {over}"
    return None


def size_of(entry: dict[str, Any], shape: tuple[int, ...]) -> int:
    """Bytes; 0 where an extent is not known."""
    return max(0, int(np.prod(shape, dtype=np.int64))) * np.dtype(DTYPES[entry["dtype"]]).itemsize


def compute(
    fake: Fake, engine: Any, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int], scratch: tuple[int, int] | None
) -> None:
    """What the GPU would do when the stream comes to it: from the bytes behind the addresses of then."""
    facts = facts_of(engine)
    if facts["session"] is None:
        ort._start_thread_pool(None)  # the one of the process, as cachec's own sessions have
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        facts["session"] = onnxruntime.InferenceSession(
            facts["model"].SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    if scratch is not None:
        fake.memory.view(*scratch)[:] = DIRT
    given = {}
    for name, shape in shapes.items():
        entry = facts["io"][name]
        data = fake.memory.view(addresses[name], size_of(entry, shape))
        given[name] = data.view(DTYPES[entry["dtype"]]).reshape(shape).copy()
    names = [entry["name"] for entry in facts["plan"]["io"] if entry["mode"] == "OUTPUT"]
    for name, value in zip(names, facts["session"].run(names, given), strict=True):
        fake.memory.view(addresses[name], value.nbytes)[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
