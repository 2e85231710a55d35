"""What a back end builds engines from, and what it is asked for."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cachec.runtime.errors import InputError, unknown_name
from cachec.runtime.specs import Signature

MAX_LEVEL = 5  # of TensorRT's optimisation levels
ALL_OPTIONS = {  # of ``BuildOptions``, with the names that users give them
    "strip": "--strip-weights",
    "compatibility": "--hardware-compatibility",
    "version_compatible": "--version-compatible",
    "level": "--optimization-level",
    "workspace": "--workspace",
}
COMPATIBILITIES = ("none", "same-capability", "ampere-plus")


@dataclass(frozen=True)
class SizeRange:
    """Which values a symbolic size may take, and the one that engines are tuned for."""

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.usual <= self.most:
            raise InputError(f"a size ranges from {self.least} over {self.usual} to {self.most}; these must not decrease")


@dataclass(frozen=True)
class BuildOptions:
    """What can be asked of a builder; each back end says which options it takes.

    ``strip``: leave the weights out of the engines, and take them from the bundle's one weights file when they are loaded.
    ``compatibility``: run on other GPUs than the one that builds; some speed is lost. ``version_compatible``: load in later
    versions of the same major one. ``level``: 0 builds fast, 5 searches longest. ``workspace``: bytes of scratch memory that
    kernels may ask for, by default all that the GPU has. ``timing_cache``: a folder with kernel timings of earlier builds,
    which is added to.
    """

    sizes: Mapping[str, SizeRange] = field(default_factory=dict)
    strip: bool = False
    compatibility: str = COMPATIBILITIES[0]
    version_compatible: bool = False
    level: int = 3
    workspace: int | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.compatibility not in COMPATIBILITIES:
            raise unknown_name("hardware compatibility", self.compatibility, COMPATIBILITIES)
        if self.strip and self.version_compatible:
            raise InputError(
                "strip-weights and version-compatible exclude each other: later versions cannot load weights into an engine; "
                "leave one out"
            )
        if not 0 <= self.level <= MAX_LEVEL:
            raise InputError(f"optimization-level is {self.level}; it must be from 0 to {MAX_LEVEL}")

    def given(self) -> set[str]:
        """Names of the options that a user gave."""
        plain = BuildOptions()
        return {name for name in ALL_OPTIONS if getattr(self, name) != getattr(plain, name)}


def build_options(**given: Any) -> BuildOptions:
    """Options by the names that users give them (``ALL_OPTIONS``); ``workspace`` in GB.

    Raises:
        InputError: there is no such option, or it is out of range.
    """
    names = {flag.removeprefix("--").replace("-", "_"): name for name, flag in ALL_OPTIONS.items()}
    for name in given:
        if name not in names:
            raise unknown_name("option", name, names)
    workspace = given.pop("workspace", None)
    if workspace is not None and not 0 < workspace < math.inf:
        raise InputError(f"workspace is {workspace} GB; it must be above 0")
    scratch = None if workspace is None else math.ceil(workspace * 1e9)
    return BuildOptions(workspace=scratch, **{names[name]: value for name, value in given.items()})


class Sources(ABC):
    """The graphs of one bundle, in the forms that builders take. All have the same names, inputs and outputs."""

    signatures: Mapping[str, Signature]
    precision: str
    shape_bucket: str

    @property
    def size(self) -> str:
        """Height and width, for names of files."""
        return self.shape_bucket.split(",")[0]

    @abstractmethod
    def programs(self) -> Mapping[str, Any]:
        """``torch.export.ExportedProgram`` by name.

        Raises:
            InputError: there are none here; says what to do.
        """

    @abstractmethod
    def onnx(self) -> Mapping[str, Path]:
        """ONNX files by name, with their weights beside them."""
