"""``--verify-passes``: play the graphs after each pass, on numbers, and compare them with how they were before it.

``B`` samples, which are as many steps: each has a time of its own.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from cachec.compiler.graphs.capture import joined, named_model
from cachec.compiler.graphs.prepare import engine, linear, prepare
from cachec.compiler.graphs.weights import Values
from cachec.compiler.models.base import LoadedModel, Settings
from cachec.passes import Equivalence, Graphs, Groups, Pass, PassResult, compute_graphs
from cachec.passes.base import outputs, placeholders, tensors
from cachec.runtime.abi import (
    ADVANCE,
    BASE,
    BASE_SHARE,
    BIAS,
    COEFFICIENTS,
    COMPUTE,
    DELTA,
    DELTAS,
    FEATURE,
    FEATURES,
    FORECAST,
    FORECASTS,
    HISTORY_STEPS,
    MODEL,
    NEXT_LATENTS,
    PROLOGUE,
    SIGMAS,
    STEP,
    TARGET_TIMESTEP,
    TOKENS,
    VELOCITIES,
    VELOCITY,
    history_name,
    history_window,
    hoisted_name,
    timesteps_of,
)
from cachec.runtime.errors import PassError
from cachec.runtime.model_io import ModelIO

log = logging.getLogger(__name__)

ROUNDING_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
PRECISION_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of what is cast to one of these
OWN_ROUNDING = {torch.float32: 0.0, torch.float16: 1e-2, torch.bfloat16: 3e-1}  # of an eager model, which rounds timesteps, too
SHIFT = 0.25  # of the forecast feature against the true one, so that it is not forgotten
HALVES = (1.0, 0.5), (0.5, 1.0)  # two slots by what they are of the feature, and their coefficients: the sum is exact


Seen = tuple[str, torch.Tensor, torch.Tensor | None]  # what it means, its value, and what it must be if it is new


@dataclass
class Verifier:
    """An observer of passes, from the captured model to the engines' graphs.

    ``inputs`` of the model, in which ``io`` says what is what; ``loaded``: the type of its weights. ``values`` are what was
    seen last, by what it means; at first the velocity that the eager model gives. A pass may change values as far as its
    ``equivalence`` allows.
    """

    inputs: Mapping[str, torch.Tensor]
    io: ModelIO
    values: dict[str, torch.Tensor]
    loaded: torch.dtype = torch.float32
    _weights: Values = field(default_factory=Values, init=False)
    _tail: fx.GraphModule | None = field(default=None, init=False)
    _num_levels: int = field(default=0, init=False)  # of the schedule; a pruned predictor may not read it any more

    @torch.no_grad()
    def __call__(self, index: int, one: Pass, result: PassResult) -> None:
        allowed = self._allowed(one, result.graphs)
        for name, value, new in self._play(self._weights.graphs(result.graphs)):
            wanted = self.values.get(name, new)
            if wanted is not None:
                _compare(one, name, value, wanted, allowed)
            self.values[name] = value

    def _allowed(self, one: Pass, graphs: Graphs) -> float:
        """The largest relative difference."""
        dtype = _precision(graphs)
        if one.equivalence == Equivalence.PRECISION:
            return max(PRECISION_TOLERANCE[dtype], OWN_ROUNDING[self.loaded])
        return ROUNDING_TOLERANCE[dtype] if one.equivalence == Equivalence.ROUNDING else 0.0

    def _play(self, graphs: Graphs) -> Iterator[Seen]:
        if MODEL in graphs.modules:
            yield VELOCITY, graphs.modules[MODEL](**self.inputs)[VELOCITY], None
            return
        hoisted = self._run_prologue(graphs)
        known = {**self.inputs, DELTA: torch.linspace(-0.5, -0.25, len(self.inputs[self.io.latents]))}
        computed: dict[str, torch.Tensor] = {}
        for name in compute_graphs(graphs):
            made = _run(graphs.modules[name], {**known, **_single(graphs, name, hoisted)})
            first = name == COMPUTE
            computed = made if first else computed
            yield (VELOCITY if first else f"{name} {VELOCITY}"), made[VELOCITY], None
            kept = f"kept {FEATURE}" if graphs.groups.sizes else TOKENS if _keeps_tokens(graphs) else FEATURE  # in a code
            yield (kept if first else f"{name} {kept}"), made[FEATURE], None
            if TOKENS in made:
                yield TOKENS, made[TOKENS], None
            if NEXT_LATENTS in made:
                moved = self.inputs[self.io.latents] + _each(known[DELTA], made[VELOCITY]) * made[VELOCITY]
                yield f"{name} {NEXT_LATENTS}", made[NEXT_LATENTS], moved
        if FORECAST in graphs.modules:
            yield from self._play_forecast(graphs, {**known}, hoisted, computed)
        if ADVANCE in graphs.modules:
            yield self._play_advance(graphs.modules[ADVANCE], computed[VELOCITY])

    def _run_prologue(self, graphs: Graphs) -> dict[str, torch.Tensor]:
        """All steps at once: as many as there are samples."""
        if PROLOGUE not in graphs.modules:
            return {}
        owners = (*compute_graphs(graphs), FORECAST)
        times = dict.fromkeys(map(timesteps_of, owners), self.inputs[self.io.timestep])
        if TARGET_TIMESTEP in self.inputs:
            times |= {timesteps_of(owner, second=True): self.inputs[TARGET_TIMESTEP] for owner in owners}
        return _run(graphs.modules[PROLOGUE], {**self.inputs, **times})

    def _play_forecast(
        self,
        graphs: Graphs,
        known: dict[str, torch.Tensor],
        hoisted: dict[str, torch.Tensor],
        computed: Mapping[str, torch.Tensor],
    ) -> Iterator[Seen]:
        module = graphs.modules[FORECAST]
        names, feature = placeholders(module), computed[FEATURE]
        single = {**known, **_single(graphs, FORECAST, hoisted)}
        if FEATURE in names:
            self._tail = module
            yield "tail", _run(module, {**single, FEATURE: feature})[VELOCITY], computed[VELOCITY]
            yield "forecast", _run(module, {**single, FEATURE: _shifted(feature)})[VELOCITY], None
        elif history_window(names):
            if SIGMAS in names:
                self._num_levels = int(names[SIGMAS].meta["val"].shape[0])
            past = {history_name(i): feature + i * SHIFT for i in range(history_window(names))}
            made = _run(module, {**single, **past, **_schedule(names, self._num_levels)})
            if FEATURE in made:
                yield "predicted feature", made[FEATURE], None
            tail = (
                None
                if self._tail is None or FEATURE not in made
                else _run(self._tail, {**known, FEATURE: made[FEATURE]})[VELOCITY]
            )
            yield "predicted velocity", made[VELOCITY], tail
        elif FORECASTS in graphs.axes[FORECAST][BIAS]:
            yield from self._play_run(graphs, {**known, **_named(FORECAST, hoisted)}, feature)
        else:
            label, slots = _in_slots(feature, graphs.groups)
            yield label, _run(module, {**single, **slots})[VELOCITY], None

    def _play_run(self, graphs: Graphs, known: dict[str, torch.Tensor], feature: torch.Tensor) -> Iterator[Seen]:
        """A run of as many forecasts as there are samples; of each sample the step that has its time is looked at."""
        steps, module = len(feature), graphs.modules[FORECAST]
        label, slots = _in_slots(feature, graphs.groups)
        rows = slots[COEFFICIENTS].expand(steps, *slots[COEFFICIENTS].shape)
        told = self.inputs[self.io.timestep][:, None].expand(steps, steps)
        bias = slots[BIAS].expand(steps, *slots[BIAS].shape)
        known |= {**slots, COEFFICIENTS: rows, BIAS: bias, self.io.timestep: told}
        made = [_run(module, {**known, DELTAS: row}) for row in torch.eye(steps)]
        moves = torch.stack([one[NEXT_LATENTS] - self.inputs[self.io.latents] for one in made])
        yield "move of a forecast", _own_step(moves), self.values.get(label)
        yield label, _own_step(made[0].get(VELOCITIES, moves)), None

    def _play_advance(self, module: fx.GraphModule, velocity: torch.Tensor) -> Seen:
        base, (sizes, row) = self.inputs[self.io.latents], HALVES
        share, slots = torch.tensor([0.75]), torch.stack([size * velocity for size in sizes])
        given = {BASE: base, BASE_SHARE: share, VELOCITIES: slots, COEFFICIENTS: torch.tensor([row])}
        return "advanced", _run(module, given)[NEXT_LATENTS], share * base + velocity.float()


def verify_twin(model: LoadedModel, settings: Settings) -> None:
    """Capture the model's thin twin, run all passes of the hidden cut on it, and compare after each. It takes seconds.

    Raises:
        PassError: a graph of it does not give what its module gives; names the pass.
    """
    thin = model.thin_twin(settings)
    if thin is None:
        log.info("%s has no thin twin to verify passes on", model.spec.name)
        return
    twin, small = thin
    watch = [verifier_for(twin, small)]
    engine(linear(prepare(twin, small, watch), watch), twin.io, watch)
    log.info("verified capture and passes on a thin twin of %s", model.spec.name)


def verifier_for(model: LoadedModel, settings: Settings) -> Verifier:
    """A verifier of what is captured for ``settings``."""
    inputs, io = model.example_inputs(settings), model.io
    with torch.no_grad():
        whole = named_model(model.capturable(model.transformer), model.constants(settings))(joined(inputs, io))[VELOCITY]
    begin, end = io.output or (0, whole.shape[io.axis])
    velocity = whole.narrow(io.axis, begin, end - begin)
    return Verifier(inputs, io, {VELOCITY: velocity}, next(model.transformer.parameters()).dtype)


def _compare(one: Pass, what: str, got: torch.Tensor, wanted: torch.Tensor, allowed: float) -> None:
    if got.shape != wanted.shape:
        raise PassError(f"{what} is {list(got.shape)}, was {list(wanted.shape)}")
    error = (got.float() - wanted.float()).abs().max().item() / max(1.0, wanted.float().abs().max().item())
    log.info("verified %s: %s differs by %.1e", one.name, what, error)
    if not error <= allowed:
        raise PassError(f"{what} differs by {error:.1e} from what it was, allowed is {allowed:.0e}")


def _keeps_tokens(graphs: Graphs) -> bool:
    """Is what slots hold not at the cut, but what a predictor with a tail of its own reads?"""
    forecast = graphs.modules.get(FORECAST)
    return forecast is not None and bool(history_window(placeholders(forecast))) and FEATURE not in outputs(forecast)


def _run(module: fx.GraphModule, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = module(**{name: known[name] for name in placeholders(module)})
    return made


def _named(owner: str, hoisted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the prologue made for a graph, by the graph's names."""
    prefix = hoisted_name(owner, "")
    return {name.removeprefix(prefix): value for name, value in hoisted.items() if name.startswith(prefix)}


def _single(graphs: Graphs, owner: str, hoisted: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same, of each sample's own step."""
    own = {name: _own_step(value) if len(graphs.axes[PROLOGUE][name]) > 1 else value for name, value in hoisted.items()}
    return _named(owner, own)


def _own_step(values: torch.Tensor) -> torch.Tensor:
    """From [T, B, …] with T = B, sample b at step b: [B, …]."""
    return torch.stack([values[i, i] for i in range(len(values))])


def _each(numbers: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return numbers.view(-1, *[1] * (like.ndim - 1))


def _shifted(feature: torch.Tensor) -> torch.Tensor:
    return (feature.float() + SHIFT).to(feature.dtype)


def _in_slots(kept: torch.Tensor, groups: Groups) -> tuple[str, dict[str, torch.Tensor]]:
    """Inputs of a linear forecast that is the shifted feature; in a code, where a shift means another, the feature itself."""
    sizes, row = HALVES
    slots = torch.stack([size * kept for size in sizes])
    label, shift = ("tail", 0.0) if groups.sizes else ("forecast", SHIFT)
    rows, bias = torch.tensor([row]).repeat(groups.count, 1), torch.tensor(shift)
    if groups.by_row:
        rows, bias = torch.tensor([row]).repeat(len(kept), 1), bias.repeat(len(kept))
    return label, {FEATURES: slots, COEFFICIENTS: rows, BIAS: bias}


def _schedule(names: Mapping[str, fx.Node], num_levels: int) -> dict[str, torch.Tensor]:
    """What a predictor reads of a schedule of so many levels."""
    window = history_window(names)
    return {
        SIGMAS: torch.linspace(1, 0, num_levels),
        STEP: torch.tensor(min(window + 1, num_levels - 2)),
        HISTORY_STEPS: torch.arange(window, 0, -1),
    }


def _precision(graphs: Graphs) -> torch.dtype:
    """The smallest floating type that the graphs compute in."""
    found = {value.dtype for module in graphs.modules.values() for node in module.graph.nodes for value in tensors(node)}
    return next((low for low in (torch.bfloat16, torch.float16) if low in found), torch.float32)
