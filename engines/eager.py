"""PyTorch, op by op: the reference back end. It runs wherever torch does and defines what the others must equal.

``threads`` is PyTorch's own setting, which holds for the whole process.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cachec.runtime.engine import Engine, ExecutionContext, check_bindings
from cachec.runtime.errors import BundleError, missing_extra
from cachec.runtime.specs import Array, Signature

if importlib.util.find_spec("torch") is None:
    raise missing_extra("torch", "compile", "the eager backend")
import torch

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class EagerEngine(Engine):
    """An exported program, run by PyTorch on the CPU."""

    name = "eager"
    needs_same_version = True

    def __init__(self, module: torch.nn.Module, signature: Signature) -> None:
        self._module: Any = module
        self.signature = signature

    @classmethod
    def load(cls, path: Path, signature: Signature, *, threads: int | None = None) -> Self:
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            program = torch.export.load(path)
        except (RuntimeError, ValueError, OSError) as error:
            raise BundleError(f"torch {torch.__version__} cannot load {path}: {error}") from error
        return cls(program.module(check_guards=False), signature)

    def context(self) -> ExecutionContext:
        if self._module is None:
            raise BundleError("the engine was closed: load the bundle again")
        return _EagerContext(self._module, self.signature)

    def close(self) -> None:
        self._module = None

    @staticmethod
    def version() -> str:
        return str(torch.__version__)

    @staticmethod
    def build(programs: Mapping[str, "ExportedProgram"], signatures: Mapping[str, Signature], out: Path) -> dict[str, Path]:
        """Write one ``.pt2`` file per program into ``out``; returns them by program name."""
        paths = {}
        for name, program in programs.items():
            paths[name] = out / f"{name}.pt2"
            torch.export.save(program, paths[name])
        return paths


class _EagerContext(ExecutionContext):
    def __init__(self, module: torch.nn.Module, signature: Signature) -> None:
        self._module = module
        self._signature = signature

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        check_bindings(self._signature, inputs, outputs)
        results = self._module(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        for name, array in outputs.items():
            torch.from_numpy(array).copy_(results[name])
