"""Which workers a command gets, from its options."""

from collections.abc import Callable

from cachec.compiler.calibration.processes import ProcessCrew
from cachec.compiler.calibration.ray_actors import RayCrew
from cachec.compiler.calibration.workers import Crew, Place
from cachec.compiler.options import WorkersWish
from cachec.runtime.device import DeviceName
from cachec.runtime.errors import InputError

RAY = "ray"


def choose_crew(
    wish: WorkersWish, device: str | None, check_device: Callable[[DeviceName], None], *, default: str | None = None
) -> Crew | None:
    """The workers that are asked for, or ``None``: this process does the work.

    ``device`` is what ``--device`` says; without it Ray's workers get the ``default`` kind, or whatever there is.

    All that can be wrong is found in seconds; ``check_device`` raises for a device of this machine that is not there.

    Raises:
        InputError: options contradict each other, a device is given twice or not there, or nobody answers at the address.
        MissingExtraError: Ray is not installed.
    """
    if wish.devices is not None:
        return ProcessCrew(tuple(Place(str(name)) for name in _read_devices(wish, wish.devices, device, check_device)))
    if wish.workers is None:
        return None
    how, _, address = wish.workers.partition(":")
    if how != RAY or (":" in wish.workers and not address):
        raise InputError(f"workers is {wish.workers!r}; use ray, or ray:HOST:PORT of a cluster")
    crew = RayCrew(address or None, default if device is None else _read_kind(device))
    crew.check()
    return crew


def first_device(wish: WorkersWish, device: str | None) -> str | None:
    """The device of what this process does itself: the first of several."""
    return device if wish.devices is None else str(DeviceName.parse(wish.devices.split(",")[0]))


def _read_devices(
    wish: WorkersWish, devices: str, device: str | None, check_device: Callable[[DeviceName], None]
) -> tuple[DeviceName, ...]:
    if wish.workers is not None:
        raise InputError(
            "--workers and --devices contradict each other: give one. Ray finds the devices of its machines itself"
        )
    if device is not None:
        raise InputError("--device and --devices contradict each other: give one")
    names = tuple(DeviceName.parse(text) for text in devices.split(","))
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise InputError(f"device {', '.join(twice)} is given twice: a process for each would only share it")
    if len({name.kind for name in names}) > 1:
        raise InputError(f"devices are {', '.join(map(str, names))}: take devices of one kind, whose results are alike")
    for name in names:
        check_device(name)
    return names


def _read_kind(device: str) -> str:
    name = DeviceName.parse(device)
    if name.index:
        raise InputError(f"device is {name}, but Ray chooses among the GPUs itself: say cuda")
    return name.kind
