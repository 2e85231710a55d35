"""What room this machine has, on disks and in memory. What is not known is not checked."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from cachec.runtime.errors import EngineError, OutputError

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # of both kinds of groups


def check_disk(place: Path, needed: float, what: str, advice: str = "choose another place with -o") -> None:
    """Raise ``OutputError`` unless the disk of ``place``, which need not exist yet, has room for ``needed`` bytes."""
    there = next(folder for folder in (place.absolute(), *place.absolute().parents) if folder.exists())
    if needed > (free := shutil.disk_usage(there).free):
        raise OutputError(
            f"{what} takes {in_bytes(needed)} of disk, and {there} has {in_bytes(free)} left: make room there, or {advice}"
        )


def check_memory(needed: float, what: str, advice: str) -> None:
    """Raise ``EngineError`` unless ``needed`` bytes of this machine's memory are free, as far as that is known."""
    free = free_memory()
    if free is not None and needed > free:
        raise EngineError(f"{what} takes {in_bytes(needed)} of memory, and this machine has {in_bytes(free)} free: {advice}")


def free_memory() -> int | None:
    """Bytes that this process may still take: of what the system has, and of what its container may use. ``None``: unknown."""
    return min((*_of_system(), *_of_groups()), default=None)


def _of_system() -> Iterator[int]:
    for line in _read(PROC / "meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _of_groups() -> Iterator[int]:
    """What each control group that the process is in, and each above it, has left; cached files can be given up."""
    for line in _read(PROC / "self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        root = GROUPS if not kinds else GROUPS / "memory"
        own = root / path.strip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            for limit, used in (map(_read, (folder / name for name in names)) for names in LIMITS):
                if limit.strip().isdigit() and used.strip().isdigit():
                    yield max(0, int(limit) - int(used) + _cached(folder))


def _cached(group: Path) -> int:
    facts = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
    return sum(int(facts.get(name, 0)) for name in ("active_file", "inactive_file"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # not Linux, or no such group
        return ""


def in_bytes(size: float) -> str:
    """As people write it: ``23.80 GB``."""
    return f"{scaled(size)}B"


def scaled(value: float) -> str:
    """Two decimals, and the prefix of a unit."""
    scale, prefix = next((scale, prefix) for scale, prefix in PREFIXES if value >= scale or scale == 1)
    return f"{value / scale:.2f} {prefix}"
