"""The build face of every back end: what engines are built from, and what builds them.

Apart from ``runtime/engine.py``, so that a machine which only runs engines needs nothing of it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.device import DeviceName
from cachec.runtime.engine import HOST, Engine
from cachec.runtime.specs import Signature
from cachec.runtime.variants import label_of_shapes

ENGINES = "engines"  # folder of a bundle's engines


class Sources(ABC):
    """The graphs of one bundle, in the forms that builders take. All have the same names, inputs and outputs.

    ``folder``: where in the bundle what is built of them goes.
    """

    folder = ENGINES
    signatures: Mapping[str, Signature]
    precision: str
    shape_bucket: str

    @property
    def size(self) -> str:
        """The sizes and lengths of texts, for names of files."""
        return label_of_shapes(self.shape_bucket)

    @abstractmethod
    def programs(self) -> Mapping[str, Any]:
        """``torch.export.ExportedProgram`` by name.

        Raises:
            InputError: there are none here; says what to do.
        """

    @abstractmethod
    def onnx(self) -> Mapping[str, Path]:
        """ONNX files by name, with their weights beside them."""


class EngineBuilder(ABC):
    """Builds what ``engine`` runs. Keeps nothing between builds.

    ``device_bound``: what it builds runs only on the kind of device that it was built for. ``bounded``: it takes symbolic sizes
    only in the ranges that it was built for. ``apart``: it builds from ONNX files alone, takes memory and time, and may crash,
    so that whoever has more to lose builds in a process of its own. ``options``: those of ``BuildOptions`` that it takes; it
    ignores others.
    """

    bounded: ClassVar[bool] = False
    apart: ClassVar[bool] = False

    def __init__(self, engine: type[Engine], *, device_bound: bool = False, options: frozenset[str] = frozenset()) -> None:
        self.engine = engine
        self.device_bound = device_bound
        self.options = options

    def check_build(self, device: DeviceName, precision: str, options: BuildOptions) -> None:
        """Raise ``InputError`` unless engines can be built here, for ``device``, with these options."""
        self.engine.check_target(device, precision)

    def check_room(self, weights: float, out: Path, device: DeviceName, options: BuildOptions) -> None:
        """Raise an error if what a build into ``out`` takes is not there; with how much. ``weights``: bytes.

        Called before one begins. Here: of back ends whose builds take no more than the compilation.

        Raises:
            EngineError: memory is short, of the host or of the GPU.
            OutputError: the disk is.
        """

    def needs(self, device: DeviceName, options: BuildOptions) -> dict[str, Any]:
        """What a machine must have to run engines that are built here for ``device``, beside version and precision."""
        return {}

    @abstractmethod
    def build(
        self, sources: Sources, out: Path, *, device: DeviceName = HOST, options: BuildOptions = DEFAULTS
    ) -> dict[str, Path]:
        """Build engines into the directory ``out``, from whatever form of the graphs this back end takes.

        Returns the file of each engine; several may be in one. Other files in ``out`` (shared weights) belong to them, too.
        ``device`` matters to back ends that are ``device_bound``.

        Raises:
            EngineError: the back end's library cannot; with its reason.
        """
