"""Back ends by name. One module each, imported only when used; every one can build and run (see ``runtime.engine``)."""

import importlib

from cachec.runtime.engine import Engine
from cachec.runtime.errors import unknown_name

BACKENDS = {
    "aoti": "cachec.engines.aoti:AotiEngine",
    "eager": "cachec.engines.eager:EagerEngine",
    "inductor": "cachec.engines.inductor:InductorEngine",
    "ort": "cachec.engines.ort:OrtEngine",
    "ort-tensorrt": "cachec.engines.ort_tensorrt:OrtTensorRTEngine",
    "tensorrt": "cachec.engines.tensorrt:TensorRTEngine",
    "tensorrt-rtx": "cachec.engines.tensorrt:TensorRTRtxEngine",
    "torch-tensorrt": "cachec.engines.torch_tensorrt:TorchTensorRTEngine",
}
FROM_ONNX = ("ort-tensorrt", "tensorrt", "tensorrt-rtx")  # what can be built from the ONNX files in a bundle


def get_backend(name: str) -> type[Engine]:
    """The engine class of a back end.

    Raises:
        InputError: there is no such back end; with the nearest name.
        MissingExtraError: its library is not installed.
    """
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    module, _, attribute = BACKENDS[name].partition(":")
    backend: type[Engine] = getattr(importlib.import_module(module), attribute)
    return backend
