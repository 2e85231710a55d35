"""What the small pipelines hand their transformers, and graphs in ONNX Runtime."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cachec.compiler.graphs.build_engines import LooseSources
from cachec.compiler.graphs.export import plan_engine
from cachec.engines.ort import CPU_PROVIDER, open_session
from tests.families import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a transformer, and what it gave."""

    args: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Any


def record(name, tokens=None, **changes):
    """The pipeline, and all calls of its transformer in a run; ``tokens``: attributes of the pipeline that limit its texts."""
    family = BY_NAME[name]
    pipeline = family.make()
    pipeline.set_progress_bar_config(disable=True)
    for attribute, limit in (tokens or {}).items():
        setattr(pipeline, attribute, limit)
    calls = []
    hook = pipeline.transformer.register_forward_hook(
        lambda _, args, keywords, output: calls.append(Call(args, keywords, output[0])), with_kwargs=True
    )
    family.run(pipeline, **changes)
    hook.remove()
    return pipeline, calls


def off(found, wanted):
    """The largest difference, relative to the largest value."""
    return float((torch.as_tensor(found).detach() - wanted).abs().max() / wanted.abs().max())


def run_in_ort(module, inputs, folder):
    """The outputs of a graph as ONNX Runtime computes them, by name; all inputs have the batch in front."""
    plan = plan_engine("graph", module, inputs, {})
    path = LooseSources([plan], folder).onnx()["graph"]
    session = open_session(path, [CPU_PROVIDER])
    given = {spec.name: np.ascontiguousarray(inputs[spec.name].numpy()) for spec in plan.signature.inputs}
    names = [spec.name for spec in plan.signature.outputs]
    return dict(zip(names, session.run(names, given), strict=True))
