"""What room this machine has, on disks and in memory. What is not known is not checked."""

import shutil
from pathlib import Path

from cachec.runtime.errors import EngineError, OutputError
from cachec.runtime.host_memory import free_memory

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def check_disk(place: Path, needed: float, what: str, advice: str = "choose another place with -o") -> None:
    """Raise ``OutputError`` unless the disk of ``place``, which need not exist yet, has room for ``needed`` bytes."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise OutputError(
            f"{what} takes {in_bytes(needed)} of disk, and {there} has {in_bytes(free)} left: make room there, or {advice}"
        )


def bytes_in(folder: Path) -> int:
    """Of all files in a folder, which need not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*")) if folder.is_dir() else 0


def check_memory(needed: float, what: str, advice: str) -> None:
    """Raise ``EngineError`` unless ``needed`` bytes of this machine's memory are free, as far as that is known."""
    free = free_memory()
    if free is not None and needed > free:
        raise EngineError(f"{what} takes {in_bytes(needed)} of memory, and this machine has {in_bytes(free)} free: {advice}")


def in_bytes(size: float) -> str:
    """As people write it: ``23.80 GB``."""
    return f"{scaled(size)}B"


def scaled(value: float) -> str:
    """Two decimals, and the prefix of a unit."""
    scale, prefix = next((scale, prefix) for scale, prefix in PREFIXES if value >= scale or scale == 1)
    return f"{value / scale:.2f} {prefix}"
