"""Back ends by name: one module each, imported only when used, with a run face, ``ENGINE``, and a build face, ``BUILDER``.

Importing one loads what is needed to ask it questions and to run engines; what builds is imported by the build.
"""

import importlib
from types import ModuleType

from cachec.runtime.builder import EngineBuilder
from cachec.runtime.engine import Engine
from cachec.runtime.errors import unknown_name

BACKENDS = {
    "aoti": "cachec.engines.aoti",
    "eager": "cachec.engines.eager",
    "inductor": "cachec.engines.inductor",
    "ort": "cachec.engines.ort",
    "ort-tensorrt": "cachec.engines.ort_tensorrt",
    "tensorrt": "cachec.engines.tensorrt",
    "tensorrt-rtx": "cachec.engines.tensorrt_rtx",
    "torch-tensorrt": "cachec.engines.torch_tensorrt",
}
FROM_ONNX = ("ort-tensorrt", "tensorrt", "tensorrt-rtx")  # what can be built from the ONNX files in a bundle


def get_engine(name: str) -> type[Engine]:
    """The engine class of a back end.

    Raises:
        InputError: there is no such back end; with the nearest name.
        MissingExtraError: its library is not installed.
    """
    engine: type[Engine] = _module(name).ENGINE
    return engine


def get_builder(name: str) -> EngineBuilder:
    """What builds engines of a back end. Raises as ``get_engine``."""
    builder: EngineBuilder = _module(name).BUILDER
    return builder


def _module(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    return importlib.import_module(BACKENDS[name])
