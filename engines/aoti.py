"""AOTInductor: all graphs of a bundle compiled to machine code, in one ``.pt2`` with the weights stored once.

PyTorch runs it; building takes a C++ compiler, and for CUDA the toolkit's headers and Triton. CPU threads are PyTorch's own
setting, which holds for the whole process. An archive runs on the kind of device that it was built for; on CUDA its engines
must not be called from several threads at once.
"""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from cachec.runtime.build_options import DEFAULTS, BuildOptions
from cachec.runtime.builder import EngineBuilder, Sources
from cachec.runtime.device import CUDA, Device, DeviceName
from cachec.runtime.engine import CONSTANTS, HOST, ON_HOST, Engine, ExecutionContext, LoadOptions
from cachec.runtime.errors import BundleError, EngineError, InputError, in_one_line, missing_extra
from cachec.runtime.specs import Signature

if importlib.util.find_spec("torch") is None:
    raise missing_extra("torch", "compile", "the aoti backend")
import torch
from torch.export.passes import move_to_device_pass

from cachec.engines import torch_device
from cachec.engines.torch_context import Tensors, TorchContext
from cachec.engines.torch_device import is_out_of_memory, take_options
from cachec.engines.torch_files import archive
from cachec.engines.torch_weights import read_constants

FILE = "model.pt2"
LOADING = "import sys; from torch.export.pt2_archive._package import load_pt2; load_pt2(sys.argv[1], run_single_threaded=True)"
OPTIONS = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,  # they would be stored with every graph
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",
}


class AotiEngine(Engine):
    """One graph of a ``.pt2``."""

    name = "aoti"
    needs_same_version = True

    @classmethod
    def load(
        cls, files: Mapping[str, Path], signatures: Mapping[str, Signature], options: LoadOptions = ON_HOST
    ) -> dict[str, Self]:
        there = take_options(options, signatures.values())
        path = next(iter(files.values()))
        on_gpu = options.device.kind == CUDA  # PyTorch's locks between threads cannot be captured as a CUDA graph
        try:
            runners = _load_runners(path, options.weights, single_threaded=on_gpu)
        except (RuntimeError, ValueError, OSError) as error:
            if is_out_of_memory(error):
                raise EngineError(f"there is no memory for the weights of {path.name} on {options.device}: {error}") from error
            raise BundleError(f"torch {torch.__version__} cannot load {path}: {error}") from error
        missing = files.keys() - runners.keys()
        if missing:
            raise BundleError(f"{path} holds no graph {', '.join(sorted(missing))}: compile the bundle again")
        return {name: cls(runners[name], signatures[name], there) for name in files}

    def _context(self, native: Any, device: Device) -> ExecutionContext:
        given, results = ([spec.name for spec in side] for side in (self.signature.inputs, self.signature.outputs))
        run: Any = native.loader.boxed_run

        def function(inputs: Tensors) -> Tensors:
            return dict(zip(results, run([inputs[name] for name in given]), strict=True))

        return TorchContext(function, self.signature, device)

    @classmethod
    def weights_form(cls, needs: Mapping[str, Any]) -> str | None:
        return CONSTANTS

    @classmethod
    def version(cls) -> str:
        return str(torch.__version__)

    @classmethod
    def check_target(cls, device: DeviceName, precision: str) -> None:
        torch_device.check_device(device)
        if device.index:  # load_pt2 puts weights where they were when they were saved, which is the first
            raise InputError(f"device is {device}, but aoti loads onto the first GPU only: choose it with CUDA_VISIBLE_DEVICES")


def _load_runners(path: Path, changed: Mapping[str, Path], *, single_threaded: bool) -> dict[str, Any]:
    """Runners by graph, each with weights of its own; ``changed``: files with other ones, by graph.

    PyTorch's own ``load_weights_from_disk`` lets the runners share them, and then never frees them.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader, load_pt2
    from torch.export.pt2_archive.constants import AOTINDUCTOR_DIR, WEIGHTS_DIR

    runners = load_pt2(str(path), run_single_threaded=single_threaded).aoti_runners
    with PT2ArchiveReader(str(path)) as archive:
        names = archive.get_file_names()
        files = {name.removeprefix(WEIGHTS_DIR): name for name in names if name.startswith(WEIGHTS_DIR)}
        weights = {short: torch.load(io.BytesIO(archive.read_bytes(name)), weights_only=True) for short, name in files.items()}
        for name in names:
            if name.startswith(AOTINDUCTOR_DIR) and name.endswith("weights_config.json"):
                places = json.loads(archive.read_string(name))
                wanted = {key: weights[file].as_strided(*layout) for key, (file, *layout) in places.items()}
                graph = name.removeprefix(AOTINDUCTOR_DIR).split("/")[0]
                if graph in changed:
                    others = read_constants(changed[graph], wanted)
                    wanted |= {key: value.to(wanted[key].device) for key, value in others.items()}
                runners[graph].load_constants(wanted, check_full_update=True)
    return dict(runners)


class AotiBuilder(EngineBuilder):
    """Writes one ``.pt2`` for all programs. For a GPU, the programs are moved to it."""

    def build(
        self, sources: Sources, out: Path, *, device: DeviceName = HOST, options: BuildOptions = DEFAULTS
    ) -> dict[str, Path]:
        from torch._inductor import aot_compile
        from torch.export.pt2_archive._package import package_pt2

        if not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise EngineError("the aoti backend compiles C++, and there is no g++ or clang++: install one (apt install g++)")
        compiled: dict[str, Any] = {}
        for name, program in sources.programs().items():
            if device.kind == CUDA:
                program = move_to_device_pass(program, str(device))
            args, kwargs = program.example_inputs or ((), {})
            try:
                compiled[name] = aot_compile(program.module(check_guards=False), args, kwargs, options=OPTIONS)
            except (RuntimeError, OSError) as error:  # OSError: there is no CUDA toolkit (CUDA_HOME)
                raise EngineError(f"AOTInductor cannot compile the {name} graph for {device}: {error}") from error
        path = out / FILE
        with archive(path) as file:
            package_pt2(file, aoti_files=compiled)
        if device.kind == CUDA:
            check_loading(path, device)
        return dict.fromkeys(compiled, path)


def check_loading(path: Path, device: DeviceName) -> None:
    """Load an archive in a process of its own: where PyTorch crashes, as 2.11 does on an H200, this process would go with it.

    Raises:
        EngineError: it crashed, or said why not.
    """
    done = subprocess.run([sys.executable, "-c", LOADING, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = in_one_line(done.stderr.strip().rpartition("\n")[2]) or "without a word"
        how = f"crashes (signal {-done.returncode})" if done.returncode < 0 else f"fails: {said}"
        raise EngineError(
            f"torch {torch.__version__} {how} when it loads what it compiled for {device}: compile to inductor, ort or "
            "tensorrt, or with another version of torch"
        )


ENGINE = AotiEngine
BUILDER = AotiBuilder(AotiEngine, device_bound=True)
