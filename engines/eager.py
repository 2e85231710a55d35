"""PyTorch, op by op: the reference back end. It runs wherever torch does and defines what the others must equal.

``threads`` is PyTorch's own setting, which holds for the whole process.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cachec.runtime.device import CPU, Buffer, Device, DeviceName
from cachec.runtime.engine import HOST, NOTHING, Call, Engine, ExecutionContext, check_bindings
from cachec.runtime.errors import BundleError, missing_extra
from cachec.runtime.files import writing
from cachec.runtime.specs import Signature

if importlib.util.find_spec("torch") is None:
    raise missing_extra("torch", "compile", "the eager backend")
import torch
from torch.export.passes import move_to_device_pass

from cachec.engines import torch_device
from cachec.engines.torch_device import as_tensor, device_of, watching_memory

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class EagerEngine(Engine):
    """An exported program, run by PyTorch."""

    name = "eager"
    needs_same_version = True
    device_bound = False  # programs are moved when they are loaded

    @classmethod
    def load(
        cls,
        files: Mapping[str, Path],
        signatures: Mapping[str, Signature],
        *,
        device: DeviceName = HOST,
        threads: int | None = None,
        weights: Mapping[str, Path] = NOTHING,
        needs: Mapping[str, Any] = NOTHING,
    ) -> dict[str, Self]:
        if threads is not None:
            torch.set_num_threads(threads)
        there = device_of(device, signatures.values())
        return {name: cls._open(path, signatures[name], there) for name, path in files.items()}

    @classmethod
    def _open(cls, path: Path, signature: Signature, device: Device) -> Self:
        try:
            program = torch.export.load(path)
        except (RuntimeError, ValueError, OSError) as error:
            raise BundleError(f"torch {torch.__version__} cannot load {path}: {error}") from error
        if device.name != CPU:
            with watching_memory(f"the weights of {path.name} on {device.name}"):
                program = move_to_device_pass(program, device.name)
        return cls(program.module(check_guards=False), signature, device)

    def _context(self, native: Any, device: Device) -> ExecutionContext:
        return _EagerContext(native, self.signature, device)

    @classmethod
    def version(cls) -> str:
        return str(torch.__version__)

    @classmethod
    def check_target(cls, device: DeviceName, precision: str) -> None:
        torch_device.check_device(device)

    @classmethod
    def build(
        cls,
        programs: Mapping[str, "ExportedProgram"],
        signatures: Mapping[str, Signature],
        out: Path,
        *,
        device: DeviceName = HOST,
    ) -> dict[str, Path]:
        """Write one ``.pt2`` file per program into ``out``; returns them by program name."""
        paths = {}
        for name, program in programs.items():
            paths[name] = out / f"{name}.pt2"
            program.example_inputs = None  # they would be stored as a pickle
            with writing(paths[name], RuntimeError):  # which torch's writer raises on a full disk
                torch.export.save(program, paths[name])
        return paths


class _EagerContext(ExecutionContext):
    def __init__(self, module: torch.nn.Module, signature: Signature, device: Device) -> None:
        self._module = module
        self._signature, self._device = signature, device

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        check_bindings(self._signature, self._device, inputs, outputs)
        given, wanted = ({name: as_tensor(buffer) for name, buffer in side.items()} for side in (inputs, outputs))
        return _EagerCall(self._module, given, wanted)


class _EagerCall(Call):
    def __init__(self, module: torch.nn.Module, inputs: dict[str, torch.Tensor], outputs: dict[str, torch.Tensor]) -> None:
        self._module, self._inputs, self._outputs = module, inputs, outputs

    @torch.no_grad()
    def run(self) -> None:
        with watching_memory("a call"):
            results = self._module(**self._inputs)
        for name, buffer in self._outputs.items():
            buffer.copy_(results[name])
