"""What of the host a process may take: memory, and cores."""

import os
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes: what the system can give without killing, swap included, or what is left of a container's limit, if that is less.

    ``None`` where the system does not say, as outside Linux.
    """
    if not MEMINFO.is_file():
        return None
    found = {name: int(rest.split()[0]) * 1024 for name, _, rest in _parted(MEMINFO, ":")}
    if "MemAvailable" not in found:
        return None
    return min(found["MemAvailable"] + found.get("SwapFree", 0), *_left_of_limits(), 1 << 62)


def peak_memory() -> int | None:
    """Bytes: the most that this process has had of the host's memory since it began; ``None`` where the system does not say."""
    found = {name: rest for name, _, rest in _parted(STATUS, ":")}
    return int(found["VmHWM"].split()[0]) * 1024 if "VmHWM" in found else None


def _left_of_limits() -> Iterator[int]:
    """Of every cgroup that this process is in: its limit, less what is used and cannot be dropped."""
    for _, kind, path in (line.split(":", 2) for line in _lines(OWN_CGROUPS)):
        if kind not in ("", "memory") and "memory" not in kind.split(","):
            continue
        names = ("memory.max", "memory.current") if not kind else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        base = CGROUPS if not kind else CGROUPS / "memory"
        own = base / path.strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(base) and (limit := _number(folder / names[0])) is not None:
                stat = {name: int(value) for name, _, value in _parted(folder / "memory.stat", " ")}
                droppable = stat.get("inactive_file", 0) + stat.get("active_file", 0)
                yield max(0, limit - (_number(folder / names[1]) or 0) + droppable)


def _number(path: Path) -> int | None:
    """What a file of one number says; ``None`` if there is none, or it says ``max``."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _parted(path: Path, sign: str) -> Iterator[tuple[str, str, str]]:
    return (line.partition(sign) for line in _lines(path))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
