"""Writes ``tests/data/tensorrt-rtx-properties.json`` from the installed TensorRT-RTX, when it is run as a script.

The API file of TensorRT 11.0 has the names of properties without their types, and TensorRT 11.0 itself does not load
without its libraries. TensorRT-RTX loads anywhere and has the same classes; its types are taken for properties that both have.
"""

import importlib.metadata
import json
import re
from pathlib import Path

FILE = Path(__file__).parent.parent / "data" / "tensorrt-rtx-properties.json"


def introspect(library):
    """``{class: {property: [type or None, can it be set?]}}``."""
    classes = {}
    for name, kind in vars(library).items():
        if isinstance(kind, type):
            found = {key: describe(value) for key, value in vars(kind).items() if isinstance(value, property)}
            if found:
                classes[name] = dict(sorted(found.items()))
    return dict(sorted(classes.items()))


def describe(prop):
    """``(arg0: a.b.ICudaEngine) -> a.b.Dims`` gives ``Dims``; properties without such a line have no known type."""
    match = re.search(r"-> (.+)$", (prop.fget.__doc__ or "").split("\n")[0])
    return [plain_name(match[1]) if match else None, prop.fset is not None]


def plain_name(text):
    """``nvinfer1::v_1_0::IErrorRecorder`` and ``tensorrt_rtx_bindings.tensorrt_rtx.IErrorRecorder`` without what is before."""
    return re.sub(r"(?:\w+::)+|tensorrt_rtx_bindings\.(?:tensorrt_rtx\.)?|tensorrt(?:_bindings)?\.(?:tensorrt\.)?", "", text)


if __name__ == "__main__":
    import tensorrt_rtx_bindings

    source = (
        f"tensorrt_rtx_cu13_bindings {importlib.metadata.version('tensorrt_rtx_cu13_bindings')} (public wheel), introspected"
    )
    FILE.write_text(json.dumps({"source": source, "properties": introspect(tensorrt_rtx_bindings)}, indent=1) + "\n")
