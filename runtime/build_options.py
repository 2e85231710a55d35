"""What can be asked of a builder of engines."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cachec.runtime.errors import InputError, unknown_name
from cachec.runtime.specs import TensorSpec

MAX_LEVEL = 5  # of TensorRT's optimisation levels
WORDS = {  # what messages call the options that only some back ends take
    "strip": "stripped weights",
    "refit": "refittable engines",
    "compatibility": "hardware compatibility",
    "version_compatible": "version compatibility",
    "level": "optimization level",
    "workspace": "workspace",
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
    ``refit``: engines take other weights, too; some speed is lost. ``compatibility``: run on other GPUs than the one that
    builds; some speed is lost. ``version_compatible``: load in later versions of the same major one. ``level``: 0 builds fast,
    5 searches longest. ``workspace``: bytes of scratch memory that kernels may ask for, by default all that the GPU has.
    ``timing_cache``: a folder with kernel timings of earlier builds, which is added to.
    """

    sizes: Mapping[str, SizeRange] = field(default_factory=dict)
    strip: bool = False
    refit: bool = False
    compatibility: str = COMPATIBILITIES[0]
    version_compatible: bool = False
    level: int = 3
    workspace: int | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.compatibility not in COMPATIBILITIES:
            raise unknown_name("hardware compatibility", self.compatibility, COMPATIBILITIES)
        if (self.strip or self.refit) and self.version_compatible:
            raise InputError(
                f"{WORDS['strip' if self.strip else 'refit']} and version compatibility exclude each other: later versions "
                "cannot load weights into an engine; leave one out"
            )
        if not 0 <= self.level <= MAX_LEVEL:
            raise InputError(f"the optimization level is {self.level}; it must be from 0 to {MAX_LEVEL}")
        if self.workspace is not None and self.workspace < 1:
            raise InputError(f"the workspace is {self.workspace} bytes; it must be above 0")

    def with_axes(self, axes: Mapping[str, Mapping[str, int]]) -> "BuildOptions":
        """For engines that are for several sizes of pictures, by which so long axes are; they are timed at the first."""
        names = {name: None for lengths in axes.values() for name in lengths}
        several = {name: [lengths[name] for lengths in axes.values()] for name in names}
        own = {name: SizeRange(min(lengths), lengths[0], max(lengths)) for name, lengths in several.items()}
        return replace(self, sizes={**self.sizes, **own})

    def given(self) -> set[str]:
        """Names of the options in ``WORDS`` that are not as they are by default."""
        return {name for name in WORDS if getattr(self, name) != getattr(DEFAULTS, name)}

    def only(self, names: Iterable[str]) -> "BuildOptions":
        """With those of ``WORDS`` that are not among ``names`` as they are by default."""
        return replace(self, **{name: getattr(DEFAULTS, name) for name in WORDS.keys() - set(names)})


DEFAULTS = BuildOptions()


def in_words(names: Iterable[str]) -> str:
    """Options as messages list them."""
    return ", ".join(WORDS[name] for name in sorted(names))


def shape_range(spec: TensorSpec, sizes: Mapping[str, SizeRange]) -> tuple[tuple[int, ...], ...]:
    """Least, usual and most of an input's shape.

    Raises:
        InputError: a symbolic size has no range.
    """
    if missing := [size for size in spec.shape if isinstance(size, str) and size not in sizes]:
        raise InputError(f"input {spec.name!r} has the size {missing[0]!r}, for which no range is given")
    ranges = [sizes[size] if isinstance(size, str) else SizeRange(size, size, size) for size in spec.shape]
    return tuple(tuple(getattr(one, which) for one in ranges) for which in ("least", "usual", "most"))
