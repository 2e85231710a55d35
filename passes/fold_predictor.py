"""Binding-time analysis of a predictor: what depends on the schedule only is evaluated, the rest must be a weighted sum.

An analysis, and no pass: it stands in no list. ``compiler/methods/predictor.py`` makes rows of numbers with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cachec.passes.base import backward_slice, fetch, outputs, placeholders
from cachec.runtime.abi import FEATURE, HISTORY_STEPS, SIGMAS, STEP, history_name, history_window
from cachec.runtime.errors import PredictorError

PROBE_SCALES = (1.0, 1e4)  # of the random features: a predictor may be linear near zero only
PROBE_TOKENS = 16
TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class BindingTimes:
    """A predictor's history inputs; its static nodes, which touch no feature, and its dynamic ones, in order; its result."""

    predictor: fx.GraphModule
    history: list[fx.Node]
    static: list[fx.Node]
    dynamic: list[fx.Node]
    result: fx.Node


def binding_times(predictor: fx.GraphModule) -> BindingTimes:
    """Split the nodes that lead to the predicted feature by what they depend on."""
    inputs = placeholders(predictor)
    history = [inputs[history_name(i)] for i in range(history_window(inputs))]
    result = outputs(predictor)[FEATURE]
    needed = backward_slice([result])
    touched, static, dynamic = set(history), [], []
    for node in predictor.graph.nodes:
        if node not in needed or node in touched:
            continue
        if any(argument in touched for argument in node.all_input_nodes):
            touched.add(node)
            dynamic.append(node)
        else:
            static.append(node)
    return BindingTimes(predictor, history, static, dynamic, result)


@torch.no_grad()
def fold_step(parts: BindingTimes, sigmas: torch.Tensor, step: int, history: tuple[int, ...]) -> tuple[torch.Tensor, float]:
    """Coefficients [W] and bias of one forecast: the static part is run, the dynamic part probed in float64.

    Raises:
        PredictorError: the dynamic part is not an affine combination with the same numbers for every element.
    """
    known = _evaluate_static(parts, {SIGMAS: sigmas, STEP: torch.tensor(step), HISTORY_STEPS: torch.tensor(history)})
    size, given = len(parts.history), parts.history[0].meta["val"]
    shape = (min(int(given.shape[1]), PROBE_TOKENS), *map(int, given.shape[2:]))
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(size, len(PROBE_SCALES), *shape, generator=generator, dtype=torch.float64)
    noise *= torch.tensor(PROBE_SCALES, dtype=torch.float64).view(1, -1, *[1] * len(shape))
    units = torch.zeros(size, 1 + size, *shape, dtype=torch.float64)
    units[range(size), range(1, 1 + size)] = 1  # sample 0 is zero, in sample j + 1 feature j is one
    made = _run_dynamic(parts, known, torch.cat([units, noise], dim=1))
    offset = made[0]
    bias = offset.mean().item()
    row = (made[1 : 1 + size] - offset).flatten(1).mean(1)
    expected = torch.einsum("w,wb...->b...", row, torch.cat([units[:, :1], noise], dim=1)) + bias
    scales = torch.tensor([1.0, *PROBE_SCALES], dtype=torch.float64) * max(1.0, row.abs().sum().item())
    seen = torch.cat([offset[None], made[1 + size :]])
    error = ((seen - expected).flatten(1).abs().amax(1) / scales).max().item()
    if not error <= TOLERANCE:
        raise PredictorError(
            f"the predictor is not linear in the features: at step {step} it is off by {error:.1e} from any affine combination "
            "of them with the same weights for every element. Compile with --fold none, which keeps it in the engine"
        )
    return row, bias


def _evaluate_static(parts: BindingTimes, schedule: Mapping[str, torch.Tensor]) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}
    for node in parts.static:
        if node.op == "placeholder":
            values[node] = schedule[str(node.target)]
        elif node.op == "get_attr":
            values[node] = fetch(parts.predictor, str(node.target))
        else:
            values[node] = _call(node, values)
    return values


def _run_dynamic(parts: BindingTimes, known: Mapping[fx.Node, Any], features: torch.Tensor) -> torch.Tensor:
    """What the predictor makes of ``features`` [W, samples, …], in float64."""
    values = {node: _double(value) for node, value in known.items()} | dict(zip(parts.history, features, strict=True))
    try:
        for node in parts.dynamic:
            values[node] = _double(_call(node, values))
    except RuntimeError as error:  # a weight for each token, say
        raise PredictorError(f"the predictor cannot be folded ({error}): compile with --fold none") from error
    result: torch.Tensor = values[parts.result]
    return result


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
