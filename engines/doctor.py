"""``cachec doctor``: what this machine has, and what each back end would need to run and to build here."""

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cachec.engines.backends import BACKENDS, get_builder
from cachec.engines.gpu import cuda_text, find_gpu
from cachec.runtime.build_options import DEFAULTS
from cachec.runtime.device import CPU, CUDA, DeviceName
from cachec.runtime.errors import CachecError
from cachec.runtime.host_memory import num_cores

PACKAGES = (
    "cachec",
    "numpy",
    "torch",
    "diffusers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-lean-cu13",
    "tensorrt_rtx_cu13_bindings",
    "torch-tensorrt",
    "cuda-bindings",
)
READY = "ready"
DRIVER = Path("/proc/driver/nvidia/version")  # on Linux


@dataclass(frozen=True)
class Diagnosis:
    """``machine``, ``packages`` with their versions (``None``: not installed), ``gpus``, and ``backends``.

    Of each back end: what it says to running on each kind of device and to building there; ``ready``, or why not.
    """

    machine: dict[str, Any]
    packages: dict[str, str | None]
    gpus: list[dict[str, Any]]
    no_gpu: str
    providers: list[str]
    backends: dict[str, dict[str, str]]

    def to_json(self) -> dict[str, Any]:
        return vars(self)

    def rows(self) -> list[tuple[str, str]]:
        """Rows of a table."""
        machine = self.machine
        rows = [
            ("machine", f"{machine['os']} {machine['architecture']}, {machine['cores']} cores, Python {machine['python']}"),
            ("disk", f"{machine['free_disk'] / 1e9:.1f} GB free here"),
        ]
        if machine["driver"]:
            rows.append(("driver", machine["driver"]))
        for index, gpu in enumerate(self.gpus):
            rows.append((f"cuda:{index}", f"{gpu['name']}, sm_{gpu['capability']}, driver for CUDA {cuda_text(gpu['driver'])}, "
                         f"{gpu['free_bytes'] / 1e9:.1f} of {gpu['total_bytes'] / 1e9:.1f} GB free"))  # fmt: skip
        if not self.gpus:
            rows.append(("GPU", f"none: {self.no_gpu}"))
        rows += [(name, version or "not installed") for name, version in self.packages.items()]
        rows.append(("onnxruntime's providers", ", ".join(self.providers) or "none"))
        for name, says in self.backends.items():
            rows += [(f"{name}, {what}", text) for what, text in says.items()]
        return rows


def diagnose() -> Diagnosis:
    """Look at this machine. Nothing is built or run."""
    gpus, no_gpu = _find_gpus()
    return Diagnosis(
        machine={
            "os": platform.system().lower(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "cores": num_cores(),
            "free_disk": shutil.disk_usage(".").free,
            "driver": DRIVER.read_text(encoding="utf-8").splitlines()[0] if DRIVER.is_file() else None,
        },
        packages={name: _version(name) for name in PACKAGES},
        gpus=gpus,
        no_gpu=no_gpu,
        providers=_providers(),
        backends={name: _ask(name) for name in BACKENDS},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _find_gpus() -> tuple[list[dict[str, Any]], str]:
    found: list[dict[str, Any]] = []
    while True:
        try:
            found.append(vars(find_gpu(DeviceName(CUDA, len(found)))))
        except CachecError as error:
            return found, "" if found else str(error)


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    try:
        return list(importlib.import_module("onnxruntime").get_available_providers())
    except (ImportError, OSError) as error:
        return [f"cannot be imported: {error}"]


def _ask(name: str) -> dict[str, str]:
    """What a back end says to running and building, on each kind of device that it knows."""
    try:
        builder = get_builder(name)
    except (CachecError, ImportError, OSError) as error:  # a broken installation is what people come for
        return {"anywhere": str(error)}
    kinds = [CPU, CUDA] if builder.engine.only_device is None else [builder.engine.only_device]
    says: dict[str, str] = {}
    for kind in kinds:
        device = DeviceName(kind)
        run = _answer(partial(builder.engine.check_target, device, "float32"))
        build = _answer(partial(builder.check_build, device, "float32", DEFAULTS))
        says |= {f"on {kind}": run} if run == build else {f"runs on {kind}": run, f"builds for {kind}": build}
    return says


def _answer(question: Callable[[], None]) -> str:
    try:
        question()
    except (CachecError, ImportError, OSError) as error:
        return str(error)
    return READY
