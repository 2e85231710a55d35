"""Is there room for what a command is certain to take? Asked before anything slow; what passes may still fail later.

Sizes are bytes. What is certain are weights: those of a model in memory are there already and count as nothing.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from cachec.compiler.calibration.runs import MAX_TRAINING_BYTES, features_kept
from cachec.compiler.calibration.statistics import calibration_cost, check_room
from cachec.compiler.calibration.uses import UsedPrompts
from cachec.compiler.graphs.prepare import prepare
from cachec.compiler.graphs.weights import is_large
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.compiler.planning.estimate import COMPILE_MEMORY
from cachec.engines.backends import FROM_ONNX
from cachec.engines.targets import ONNX_TARGET, TargetName
from cachec.engines.torch_device import free_bytes
from cachec.passes.base import outputs
from cachec.runtime.abi import COMPUTE, FEATURE
from cachec.runtime.device import CPU, DeviceName
from cachec.runtime.errors import EngineError
from cachec.runtime.host_memory import free_memory
from cachec.runtime.room import bytes_in, check_disk, check_memory, in_bytes
from cachec.runtime.specs import itemsize


def weight_bytes(model: LoadedModel, precision: str) -> int:
    """Of a model's weights in ``precision``, if they are on disk; 0 of one in memory."""
    if model.stored is None:
        return 0
    return sum(parameter.numel() for parameter in model.stored.module.parameters()) * itemsize(precision)


def check_compile(
    model: LoadedModel, settings: Settings, targets: Sequence[TargetName], out: Path, work: Path, *, num_sizes: int = 1
) -> None:
    """Is there disk and memory to compile to ``targets``? What an interrupted compilation left in ``work`` is there already.

    Raises:
        OutputError: the disk has no room for the bundle.
        EngineError: there is too little memory.
    """
    weights = weight_bytes(model, settings.dtype)
    others = {name.backend for name in targets} - {
        ONNX_TARGET.backend,
        *FROM_ONNX,
    }  # each has the weights in files of its own, for each size
    shared = any(name.backend not in others for name in targets)
    check_disk(out.parent, weights * (num_sizes * len(others) + shared) - bytes_in(work), "the bundle")
    if model.stored is not None and is_large(model.stored.module):
        what = f"compiling to {', '.join(map(str, targets))}"
        check_memory(
            COMPILE_MEMORY + (weights if others else 0), what, "stop other programs, or compile with --target ort alone"
        )


def check_calibration(model: LoadedModel, settings: Settings, prompts: UsedPrompts, reference: int, work: Path) -> None:
    """Is there room for the records of a calibration, whatever the model's features are like? As ``statistics.check_room``."""
    latents = model.example_inputs(settings)[model.io.latents].shape[1:]
    whole = prompts.num_whole
    cost = calibration_cost(tuple(latents), (1, 1), settings, whole, reference, choosing=len(prompts.prompts) - whole)
    check_room(cost, work)


def check_training(model: LoadedModel, settings: Settings, prompts: int, work: Path) -> None:
    """Is there room for the features that a training records: on the disk of ``work``, and in memory while they are joined?

    Raises:
        OutputError: the disk is too full.
        EngineError: there is too little memory.
    """
    feature = outputs(prepare(model, settings).modules[COMPUTE])[FEATURE].meta["val"]
    num_tokens, channels = int(feature.shape[1]), math.prod(map(int, feature.shape[2:]))
    elements = prompts * settings.steps * channels
    tokens, dtype = features_kept(num_tokens, elements * itemsize("float32"), MAX_TRAINING_BYTES)
    size = tokens * elements * itemsize(dtype)
    check_memory(2 * size, "recording the runs to train on", "give fewer prompts, or take a machine with more")
    check_disk(work, size - bytes_in(work), "recording the runs to train on", "give fewer prompts, or another place with -o")


def check_evaluation(model: LoadedModel, precision: str, device: DeviceName, activations: int = 0) -> int | None:
    """Is there memory on ``device`` to run the model in ``precision``, with the ``activations`` of one sample?

    Returns how many samples at once have room; ``None`` if that is not known.

    Raises:
        EngineError: there is too little memory.
    """
    weights = weight_bytes(model, precision)
    free = free_memory() if device.kind == CPU else free_bytes(device)
    if free is None:
        return None
    if weights + activations > free:
        where, advice = "this machine", "run it on a GPU with --device cuda, or on a machine with more"
        if device.kind != CPU:
            where, advice = str(device), "stop what else uses it, take --dtype bfloat16 or smaller sizes, or a larger GPU"
        raise EngineError(
            f"running the model in {precision} takes {in_bytes(weights + activations)} of memory "
            f"({in_bytes(weights)} are weights), and {where} has {in_bytes(free)} free: {advice}"
        )
    return (free - weights) // activations if activations else None
