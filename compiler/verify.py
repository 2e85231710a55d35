"""``--verify-passes``: compare the graphs with eager after each pass, on numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from cachec.passes import COMPUTE, FORECAST, MODEL, Graphs, Pass, PassResult
from cachec.passes.base import placeholders
from cachec.runtime.engine import (
    BIAS,
    COEFFICIENTS,
    FEATURE,
    FEATURES,
    HISTORY_STEPS,
    SIGMAS,
    STEP,
    VELOCITY,
    history_name,
)
from cachec.runtime.errors import PassError

FOLD_TOLERANCE = 1e-5  # float32: folding changes the order of a few sums


@dataclass
class Verifier:
    """An observer of passes. ``model`` is the eager module behind the captured graph, by keyword.

    Before and after the split the comparison is exact. A folded predictor is compared with the unfolded one, which the
    verifier remembers, on random histories, within ``FOLD_TOLERANCE``.
    """

    reference: torch.Tensor
    inputs: Mapping[str, torch.Tensor]
    sigmas: torch.Tensor
    histories: Mapping[int, tuple[int, ...]]
    lines: list[str] = field(default_factory=list)
    """One line a comparison, for the log."""
    _unfolded: fx.GraphModule | None = None

    @torch.no_grad()
    def __call__(self, index: int, one: Pass, result: PassResult) -> None:
        modules = result.graphs.modules
        if MODEL in modules:
            self._compare(one, "model", modules[MODEL](**self.inputs)[VELOCITY], 0.0)
            return
        computed = modules[COMPUTE](**self.inputs)
        self._compare(one, "compute", computed[VELOCITY], 0.0)
        names = placeholders(modules[FORECAST])
        known = {name: value for name, value in self.inputs.items() if name in names}
        if FEATURE in names:
            self._compare(one, "forecast", modules[FORECAST](**known, feature=computed[FEATURE])[VELOCITY], 0.0)
        elif FEATURES in names:
            self._compare_folded(one, result.graphs, known, computed[FEATURE])
        else:
            self._unfolded = modules[FORECAST]

    def _compare(self, one: Pass, what: str, got: torch.Tensor, tolerance: float, wanted: torch.Tensor | None = None) -> None:
        wanted = self.reference if wanted is None else wanted
        error = (got - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
        self.lines.append(f"{one.name}: {what} differs by {error:.1e}")
        if not error <= tolerance:
            raise PassError(f"{what} differs from eager by {error:.1e}, allowed is {tolerance:.0e}")

    def _compare_folded(self, one: Pass, graphs: Graphs, known: Mapping[str, torch.Tensor], feature: torch.Tensor) -> None:
        if self._unfolded is None or graphs.rows is None:
            raise PassError("a folded predictor was met before the unfolded one")
        names = placeholders(self._unfolded)
        for step, history in self.histories.items():
            generator = torch.Generator().manual_seed(step)
            past = [feature + torch.randn(feature.shape, generator=generator).to(feature) for _ in history]
            schedule = {SIGMAS: self.sigmas, STEP: torch.tensor(step), HISTORY_STEPS: torch.tensor(history)}
            entries = {history_name(i): value for i, value in enumerate(past)}
            given = {k: v for k, v in {**known, **schedule, **entries}.items() if k in names}
            wanted = self._unfolded(**given)[VELOCITY]
            row = graphs.rows.coefficients[step].float()
            bias = graphs.rows.bias[step].float()
            linear = {FEATURES: torch.stack(past), COEFFICIENTS: row, BIAS: bias}
            got = graphs.modules[FORECAST](**known, **linear)[VELOCITY]
            self._compare(one, f"forecast of step {step}", got, FOLD_TOLERANCE, wanted)


def eager_output(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the verifier compares with."""
    with torch.no_grad():
        result: torch.Tensor = model(dict(inputs))[VELOCITY]
    return result
