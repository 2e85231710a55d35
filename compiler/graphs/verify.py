"""``--verify-passes``: compare the graphs with eager after each pass, on numbers."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from cachec.passes import CastPrecision, Graphs, Pass, PassResult
from cachec.passes.base import outputs, placeholders
from cachec.runtime.abi import (
    BIAS,
    COEFFICIENTS,
    COMPUTE,
    DELTA,
    FEATURE,
    FEATURES,
    FORECAST,
    HISTORY_STEPS,
    MODEL,
    NEXT_LATENTS,
    PROLOGUE,
    SIGMAS,
    STEP,
    VELOCITY,
    history_name,
    timesteps_of,
)
from cachec.runtime.errors import PassError

log = logging.getLogger(__name__)

FOLD_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}  # folding changes the order of a few sums
PRECISION_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of a graph cast to one of these
OWN_ROUNDING = {torch.float32: 0.0, torch.float16: 1e-2, torch.bfloat16: 3e-1}  # of an eager model, which rounds timesteps, too


@dataclass
class Verifier:
    """An observer of passes. ``reference`` is what the eager model gives for ``inputs``.

    Before and after the split the comparison is exact, and so is that of the inlined predictor with the tail behind it. But
    the pass that changes the precision to ``dtype`` is allowed ``PRECISION_TOLERANCE``, or the ``OWN_ROUNDING`` of an eager
    model that was ``loaded`` in another; later ones are compared with what it made. A folded predictor is compared with the
    unfolded one, which the verifier remembers, on random histories, within ``FOLD_TOLERANCE``.
    """

    reference: torch.Tensor
    inputs: Mapping[str, torch.Tensor]
    sigmas: torch.Tensor
    histories: Mapping[int, tuple[int, ...]]
    timestep: str = "timestep"
    latents: str = "latents"
    dtype: torch.dtype = torch.float32
    loaded: torch.dtype = torch.float32
    _unfolded: fx.GraphModule | None = None
    _tail: fx.GraphModule | None = None

    @torch.no_grad()
    def __call__(self, index: int, one: Pass, result: PassResult) -> None:
        modules = result.graphs.modules
        if MODEL in modules:
            got, allowed = modules[MODEL](**self.inputs)[VELOCITY], 0.0
            if isinstance(one, CastPrecision) and result.changed:
                allowed = max(PRECISION_TOLERANCE[self.dtype], OWN_ROUNDING[self.loaded])
            self._compare(one, "model", got, allowed)
            self.reference = got
            return
        if DELTA in placeholders(modules[COMPUTE]) or PROLOGUE in modules:
            self._compare_engines(one, result.graphs)
            return
        computed = modules[COMPUTE](**self.inputs)
        self._compare(one, "compute", computed[VELOCITY], 0.0)
        names = placeholders(modules[FORECAST])
        known = {name: value for name, value in self.inputs.items() if name in names}
        if FEATURE in names:
            self._tail = modules[FORECAST]
            self._compare(one, "forecast", modules[FORECAST](**known, feature=computed[FEATURE])[VELOCITY], 0.0)
        elif FEATURES in names:
            self._compare_folded(one, result.graphs, known, computed[FEATURE])
        else:
            self._unfolded = modules[FORECAST]
            self._compare_inlined(one, known, computed[FEATURE])

    def _compare_engines(self, one: Pass, graphs: Graphs) -> None:
        """Graphs with a prologue, or with the sampler inside. Each sample has its own timestep: it is a step of its own."""
        modules = graphs.modules
        kept = outputs(modules[COMPUTE])[FEATURE if FORECAST in modules else VELOCITY].meta["val"].dtype
        tolerance = max(FOLD_TOLERANCE[self.dtype], FOLD_TOLERANCE[kept])
        hoisted: dict[str, torch.Tensor] = {}
        if PROLOGUE in modules:
            prologue = modules[PROLOGUE]
            times = dict.fromkeys(map(timesteps_of, (COMPUTE, FORECAST)), self.inputs[self.timestep])
            hoisted = prologue(**{name: {**self.inputs, **times}[name] for name in placeholders(prologue)})
        delta = {DELTA: torch.linspace(-0.5, -0.25, len(self.reference))}
        compute = modules[COMPUTE]
        single = {name: _own_step(value) if len(graphs.axes[PROLOGUE][name]) > 1 else value for name, value in hoisted.items()}
        known = {**self.inputs, **delta, **{name.removeprefix(f"{COMPUTE}_"): value for name, value in single.items()}}
        computed = compute(**{name: known[name] for name in placeholders(compute)})
        self._compare(one, "compute", computed[VELOCITY], tolerance)
        names = placeholders(modules[FORECAST]) if FORECAST in modules else {}
        if FEATURES not in names:
            return
        batched = len(graphs.axes[FORECAST][BIAS]) > 0
        rows = {name.removeprefix(f"{FORECAST}_"): v for name, v in (hoisted if batched else single).items()}
        steps = len(self.reference)
        last = {FEATURES: computed[FEATURE][None].contiguous(), COEFFICIENTS: torch.ones(1, 1), BIAS: torch.zeros(())}
        if batched:
            told = self.inputs[self.timestep][:, None].expand(steps, steps)
            last |= {
                COEFFICIENTS: torch.ones(steps, 1, 1),
                BIAS: torch.zeros(steps),
                self.timestep: told,
            }
        known = {**self.inputs, **rows, **last}

        def forecast(**more: torch.Tensor) -> dict[str, torch.Tensor]:
            made: dict[str, torch.Tensor] = modules[FORECAST](**{name: {**known, **more}[name] for name in names})
            return made

        if not batched:
            self._compare(one, "forecast", forecast()[VELOCITY], tolerance)
            return
        moved = [forecast(deltas=row)[NEXT_LATENTS] - self.inputs[self.latents] for row in torch.eye(steps)]
        self._compare(one, "forecast", _own_step(torch.stack(moved)), tolerance)

    def _compare(self, one: Pass, what: str, got: torch.Tensor, tolerance: float, wanted: torch.Tensor | None = None) -> None:
        wanted = self.reference if wanted is None else wanted
        error = (got - wanted).abs().max().item() / max(1.0, wanted.abs().max().item())
        log.info("verified %s: %s differs by %.1e", one.name, what, error)
        if not error <= tolerance:
            raise PassError(f"{what} differs from eager by {error:.1e}, allowed is {tolerance:.0e}")

    def _compare_inlined(self, one: Pass, known: Mapping[str, torch.Tensor], feature: torch.Tensor) -> None:
        if self._unfolded is None or self._tail is None or not self.histories:
            return
        step, history = next(iter(self.histories.items()))
        past = [feature + i for i in range(len(history))]
        result = self._unfolded(**self._given(known, step, history, past))
        tail_inputs = {name: value for name, value in known.items() if name in placeholders(self._tail)}
        wanted = self._tail(**tail_inputs, feature=result[FEATURE])[VELOCITY]
        self._compare(one, "tail behind the predictor", result[VELOCITY], 0.0, wanted)

    def _given(
        self, known: Mapping[str, torch.Tensor], step: int, history: tuple[int, ...], past: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Inputs of the unfolded graph."""
        schedule = {SIGMAS: self.sigmas, STEP: torch.tensor(step), HISTORY_STEPS: torch.tensor(history)}
        entries = {history_name(i): value for i, value in enumerate(past)}
        names = placeholders(self._unfolded) if self._unfolded is not None else {}
        return {k: v for k, v in {**known, **schedule, **entries}.items() if k in names}

    def _compare_folded(self, one: Pass, graphs: Graphs, known: Mapping[str, torch.Tensor], feature: torch.Tensor) -> None:
        if self._unfolded is None or graphs.rows is None:
            raise PassError("a folded predictor was met before the unfolded one")
        for step, history in self.histories.items():
            generator = torch.Generator().manual_seed(step)
            past = [feature + torch.randn(feature.shape, generator=generator).to(feature) for _ in history]
            wanted = self._unfolded(**self._given(known, step, history, past))[VELOCITY]
            row = graphs.rows.coefficients[step].float()
            bias = graphs.rows.bias[step].float()
            linear = {FEATURES: torch.stack(past), COEFFICIENTS: row[None], BIAS: bias}
            got = graphs.modules[FORECAST](**known, **linear)[VELOCITY]
            self._compare(one, f"forecast of step {step}", got, FOLD_TOLERANCE[feature.dtype], wanted)


def _own_step(values: torch.Tensor) -> torch.Tensor:
    """From [T, B, …] with T = B, sample b at step b: [B, …]."""
    return torch.stack([values[i, i] for i in range(len(values))])


def eager_output(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the verifier compares the graphs of a model with."""
    with torch.no_grad():
        result: torch.Tensor = model(dict(inputs))[VELOCITY]
    return result


def graph_output(compute: fx.GraphModule, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What it compares later graphs with: the compute graph that was compared with the model."""
    with torch.no_grad():
        result: torch.Tensor = compute(**inputs)[VELOCITY]
    return result
