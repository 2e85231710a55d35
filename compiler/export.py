"""From rewritten graphs to what an engine builder takes: exported programs with their signatures."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx
from torch.export import ExportedProgram

from cachec.compiler.capture import BATCH, SLOTS, export_program
from cachec.passes import COMPUTE, FORECAST, Graphs
from cachec.passes.base import outputs, placeholders
from cachec.runtime.engine import BIAS, COEFFICIENTS, FEATURE, FEATURES, HISTORY_STEPS, SIGMAS, STEP, history_name
from cachec.runtime.specs import Dim, Signature, TensorSpec

EXAMPLE_SLOTS = 3  # the example's number of written slots; at least two, so that the axis stays symbolic


@dataclass(frozen=True, eq=False)
class EnginePlan:
    """One engine to build: its program and its signature."""

    name: str
    program: ExportedProgram
    signature: Signature


def plan_engines(graphs: Graphs, inputs: Mapping[str, torch.Tensor], num_steps: int) -> list[EnginePlan]:
    """Plans for the compute engine and, if there is one, the forecast engine; ``inputs`` are example inputs of the model."""
    compute = graphs.modules[COMPUTE]
    plans = [plan_engine(COMPUTE, compute, inputs)]
    if FORECAST in graphs.modules:
        with torch.no_grad():
            feature = compute(**inputs)[FEATURE]
        forecast = graphs.modules[FORECAST]
        plans.append(plan_engine(FORECAST, forecast, _forecast_inputs(forecast, inputs, feature, num_steps)))
    return plans


def plan_engine(name: str, module: fx.GraphModule, inputs: Mapping[str, torch.Tensor]) -> EnginePlan:
    """Export one graph; ``inputs`` are example values of exactly its inputs, in any order."""
    axes = {key: _symbolic_axes(key, value) for key, value in inputs.items()}
    ordered = {key: inputs[key] for key in placeholders(module)}
    program = export_program(module, ordered, axes)
    input_specs = tuple(_spec(key, value.shape, value.dtype, axes[key]) for key, value in ordered.items())
    output_specs = []
    for key, node in outputs(module).items():
        value = node.meta["val"]
        batched = {0: BATCH} if isinstance(value.shape[0], torch.SymInt) else {}
        output_specs.append(_spec(key, value.shape, value.dtype, batched))
    return EnginePlan(name, program, Signature(input_specs, tuple(output_specs)))


def _forecast_inputs(
    module: fx.GraphModule, inputs: Mapping[str, torch.Tensor], feature: torch.Tensor, num_steps: int
) -> dict[str, torch.Tensor]:
    names = placeholders(module)
    window = sum(history_name(i) in names for i in range(len(names)))
    examples = {
        **inputs,
        FEATURES: torch.stack([feature + i for i in range(EXAMPLE_SLOTS)]),
        COEFFICIENTS: torch.linspace(1, 0.5, EXAMPLE_SLOTS),
        BIAS: torch.tensor(0.5),
        SIGMAS: torch.linspace(1, 0, num_steps + 1),
        STEP: torch.tensor(min(3, num_steps - 1)),
        HISTORY_STEPS: torch.arange(window, 0, -1),
        **{history_name(i): feature + i for i in range(window)},
    }
    return {name: examples[name] for name in names}


def _symbolic_axes(name: str, value: torch.Tensor) -> dict[int, str]:
    if name == FEATURES:
        return {0: SLOTS, 1: BATCH}
    if name == COEFFICIENTS:
        return {0: SLOTS}
    return {} if name in (BIAS, SIGMAS, STEP, HISTORY_STEPS) else {0: BATCH}


def _spec(name: str, shape: torch.Size, dtype: torch.dtype, axes: Mapping[int, str]) -> TensorSpec:
    dims: tuple[Dim, ...] = tuple(axes.get(i, size) if i in axes else int(size) for i, size in enumerate(shape))
    return TensorSpec(name, dims, str(dtype).removeprefix("torch."))
