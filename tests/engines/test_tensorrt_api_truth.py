"""TensorRT 11.0 cannot be loaded here: every name of it in our code is looked up in its API file, and in TensorRT for RTX.

Types and numbers of arguments are checked where the code runs: on the fake, which is made of the same file and takes
arguments as pybind11 does (``test_fake_tensorrt``), and on the real TensorRT for RTX (``test_tensorrt_rtx``).
"""

import ast
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import tensorrt_api
import tensorrt_properties

import cachec.engines

FOLDER = Path(cachec.engines.__file__).parent
FILES = [FOLDER / f"tensorrt_{part}.py" for part in ("from_onnx", "library", "run")]  # no other holds objects of TensorRT
API = tensorrt_api.load()
VENDOR = {key for kind in API.classes.values() for key in (*(kind.enum or ()), *(kind.methods or ()), *(kind.properties or ()))}
VENDOR |= {name.split(".")[-1] for name in API.classes} | {*API.functions, *API.constants, *tensorrt_api.MODULE_FACTS}
PYTHON = {  # what the files take from Python's own objects, tqdm's and numpy's
    "load", "find_spec", "import_module", "deque", "getLogger", "INFO", "DEBUG", "log", "append", "clear", "split", "lower",
    "join", "fromkeys", "items", "values", "keys", "update", "pop", "close", "n", "name", "stem", "stat", "st_size", "open",
    "util", "fileno", "mmap", "ACCESS_READ", "Event", "set", "is_set", "submit", "result", "perf_counter",
    "read_bytes", "is_file",
    "warning", "info", "debug", "cache", "shape", "dtype", "__class__", "__members__", "__name__", "__version__", "get",
}  # fmt: skip


def attributes(path):
    return {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def own_names():
    """Whatever our own classes, functions and modules are called."""
    found = set()
    for path in (*FOLDER.glob("*.py"), *(FOLDER.parent / "runtime").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                found.add(node.attr)
    return found


USED = {path.name: attributes(path) for path in FILES}


@pytest.mark.parametrize("file", USED)
def test_every_name_is_tensorrts_or_ours_or_pythons(file):
    assert USED[file] - VENDOR - own_names() - PYTHON == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_class_in_an_annotation_exists(path):
    assert set(re.findall(r"\btrt\.(\w+)", path.read_text())) - {"ILogger"} <= set(API.classes)


def test_no_other_file_imports_tensorrt():
    rooms = (FOLDER.parent / room for room in ("runtime", "passes", "engines", "compiler"))
    files = (path for room in rooms for path in room.rglob("*.py"))
    found = {path.name for path in files if re.search(r"^\s*import tensorrt\b", path.read_text(), re.M)}
    assert found == {path.name for path in FILES}


def test_tensorrt_rtx_has_the_names_too():
    """The module that the same code is tried on, on machines without TensorRT."""
    rtx = pytest.importorskip("tensorrt_rtx_bindings")
    kinds = [kind for kind in vars(rtx).values() if isinstance(kind, type)]
    there = {*vars(rtx), *(key for kind in kinds for key in dir(kind))}
    used = set().union(*USED.values()) & VENDOR - own_names() - PYTHON
    assert len(used) > 60
    assert used - there == set()


def test_types_of_properties_are_those_of_the_installed_library():
    rtx = pytest.importorskip("tensorrt_rtx_bindings")
    kept = json.loads(tensorrt_properties.FILE.read_text())
    if importlib.metadata.version("tensorrt_rtx_cu13_bindings") not in kept["source"]:
        pytest.skip("another version is installed than the file was made with")
    assert kept["properties"] == tensorrt_properties.introspect(rtx)


def test_the_api_file_is_read_whole():
    assert API.source.startswith("tensorrt-cu13-bindings 11.0")
    assert API.classes["Logger"].properties["ERROR"] == ("ILogger.Severity", False)
    assert API.classes["DimsHW"].methods["__getitem__"][0].returns == "int"  # of Dims, two classes up
    assert [p.name for p in API.classes["INetworkDefinition"].methods["add_scale_nd"][0].parameters][-1] == "channel_axis"
    assert not {"FP16", "INT8"} & set(API.classes["BuilderFlag"].enum)
