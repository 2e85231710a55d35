"""PyTorch, op by op: the reference back end. It runs wherever torch does and defines what the others must equal.

The limit of threads is PyTorch's own setting, which holds for the whole process.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.builder import EngineBuilder, Sources
from cachec.runtime.device import CPU, Device, DeviceName
from cachec.runtime.engine import CONSTANTS, HOST, ON_HOST, Engine, ExecutionContext, LoadOptions
from cachec.runtime.errors import BundleError, missing_extra
from cachec.runtime.specs import Signature

if importlib.util.find_spec("torch") is None:
    raise missing_extra("torch", "compile", "the eager backend")
import torch
from torch.export.passes import move_to_device_pass

from cachec.engines import torch_device
from cachec.engines.torch_context import TorchContext
from cachec.engines.torch_device import neutral_modes, take_options, watching_memory
from cachec.engines.torch_files import archive
from cachec.engines.torch_weights import read_constants


class ProgramEngine(Engine):
    """An exported program, run by PyTorch one way or another. Programs are moved to their device when they are loaded."""

    needs_same_version = True

    @classmethod
    def load(
        cls, files: Mapping[str, Path], signatures: Mapping[str, Signature], options: LoadOptions = ON_HOST
    ) -> dict[str, Self]:
        there = take_options(options, signatures.values())
        with neutral_modes(there.name):
            return {
                name: cls(_load_module(path, there, options.weights.get(name)), signatures[name], there)
                for name, path in files.items()
            }

    @classmethod
    def weights_form(cls, needs: Mapping[str, Any]) -> str | None:
        return CONSTANTS

    def _context(self, native: Any, device: Device) -> ExecutionContext:
        return TorchContext(lambda inputs: native(**inputs), self.signature, device)

    @classmethod
    def version(cls) -> str:
        return str(torch.__version__)

    @classmethod
    def check_target(cls, device: DeviceName, precision: str) -> None:
        torch_device.check_device(device)


def _load_module(path: Path, device: Device, weights: Path | None) -> torch.nn.Module:
    try:
        program = torch.export.load(path)
    except (RuntimeError, ValueError, OSError, BadZipFile) as error:
        raise BundleError(f"torch {torch.__version__} cannot load {path}: {error}") from error
    if weights is not None:
        for name, value in read_constants(weights, program.state_dict).items():
            is_parameter = isinstance(program.state_dict[name], torch.nn.Parameter)
            program.state_dict[name] = torch.nn.Parameter(value, requires_grad=False) if is_parameter else value
    if device.name != CPU:
        with watching_memory(f"the weights of {path.name} on {device.name}"):
            program = move_to_device_pass(program, device.name)
    return program.module(check_guards=False)


class EagerEngine(ProgramEngine):
    """A program as it is."""

    name = "eager"


class ProgramBuilder(EngineBuilder):
    """Writes one ``.pt2`` file per program."""

    def build(
        self, sources: Sources, out: Path, *, device: DeviceName = HOST, options: BuildOptions = DEFAULTS
    ) -> dict[str, Path]:
        paths = {}
        for name, program in sources.programs().items():
            paths[name] = out / f"{name}.pt2"
            examples, program.example_inputs = program.example_inputs, None  # they would be stored as a pickle
            try:
                with archive(paths[name]) as file:
                    torch.export.save(program, file)
            finally:
                program.example_inputs = examples  # the builder of another target may want them
        return paths


ENGINE = EagerEngine
BUILDER = ProgramBuilder(EagerEngine)
