"""What a program is to ``lanes``: calls that fit into batches, which of them may share one, and stages for the policy.

``B`` batch. A request is a batch of one (two rows of the model if it is guided); here nothing touches a device.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from cachec.runtime.abi import BATCH
from cachec.runtime.engine import Engine
from cachec.runtime.errors import InputError
from cachec.runtime.lane_costs import Costs, Meeting
from cachec.runtime.lane_policy import Kind, Stage
from cachec.runtime.noise import make_noise
from cachec.runtime.plan import BindingPlan, Layout, PlannedCall, View, condition_name, lay_out
from cachec.runtime.plan_buffers import tables_of
from cachec.runtime.planner import plan_binding
from cachec.runtime.session import LoadedBundle
from cachec.runtime.specs import Array, TensorSpec
from cachec.runtime.variants import PictureSize, find_text


@dataclass(frozen=True, eq=False)
class Port:
    """Where all calls of an engine meet that have these ``sizes`` beside the batch. ``name`` says both.

    ``shares``: can requests share a call? Not where the engine has no batch axis.
    """

    name: str
    engine: Engine
    sizes: Mapping[str, int]
    shares: bool
    computes: bool

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.engine.signature.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.engine.signature.outputs

    def has_rows(self, spec: TensorSpec) -> bool:
        """Does a tensor have rows of each request? If not, it is the same for all who share a call."""
        return self.shares and BATCH in spec.shape


@dataclass(frozen=True, eq=False)
class LaneCall:
    """A planned call on ``rows`` rows. Those of one ``port`` with equal ``shared`` data may be one batch.

    ``shared`` stands for the inputs without a batch axis; ``asks``: what a request brings without one counts, too.
    """

    planned: PlannedCall
    port: Port
    rows: int
    shared: tuple[object, ...]
    asks: bool

    @cached_property
    def meeting(self) -> Meeting:
        """The same to the policy."""
        return Meeting(self.port.name, self.rows, self.shared if self.port.shares else None, self.port.computes, self.asks)


@dataclass(frozen=True, eq=False)
class LanePlan:
    """A program of a loaded bundle, for requests of one sample each."""

    level: str
    num_steps: int
    plan: BindingPlan
    layout: Layout
    calls: tuple[LaneCall, ...]

    @classmethod
    def of(cls, bundle: LoadedBundle, level: str, start: int, place: str, ports: dict[str, Port]) -> "LanePlan":
        """The plan of a level from step ``start`` on.

        ``place`` tells engines of one name apart; ``ports`` takes in those that are new.

        Raises:
            InputError: the bundle was compiled for another batch, or the level cannot begin at this step.
        """
        program = bundle.begun(bundle.programs[level], start)
        if program.key.batch not in (None, 1):
            raise InputError(f"this bundle was compiled for batches of {program.key.batch}: lanes take requests of one sample")
        signatures = {name: engine.signature for name, engine in bundle.engines.items()}
        plan = plan_binding(signatures, program, bundle.io, batch=1, tables=tables_of(bundle.engines))
        computing = {one.graph for one in program.instructions if one.computes}
        known, made = _comparable(plan), []
        for planned in (*(() if plan.prologue is None else (plan.prologue,)), *plan.operations):
            engine = bundle.engines[planned.engine]
            port, rows = _port(engine, planned, plan, place, known, computes=planned.engine in computing)
            port = ports.setdefault(port.name, port)
            shared, asks = _shared(planned, port, plan, f"{place}{program.num_steps}/{start}/{level}")
            made.append(LaneCall(planned, port, rows, shared, asks))
        return cls(level, program.num_steps, plan, lay_out(plan), tuple(made))

    @property
    def own_bytes(self) -> int:
        """What a lane needs beside the constants, which all lanes share."""
        return self.layout.size - self.layout.constant_bytes

    @cached_property
    def stages(self) -> tuple[range, ...]:
        """The calls of each stage: from one that computes up to the next; the first stage has what comes before, too."""
        starts = [place for place, call in enumerate(self.calls) if call.port.computes]
        bounds = [0, *starts[1:], len(self.calls)]
        return tuple(range(first, stop) for first, stop in pairwise(bounds))

    def kind(self, costs: Costs) -> Kind:
        """What the policy knows of requests that play it."""
        return Kind([Stage(tuple(self.calls[place].meeting for place in stage)) for stage in self.stages], costs)

    def latents_after(self, place: int) -> View:
        """Where the latents are when the calls up to this one are made."""
        following = self.calls[place + 1 :][:1]
        view = following[0].planned.latents if following else self.plan.final
        return self.plan.final if view is None else view

    def noise(self, noise: Array | None, seed: int | None) -> Array:
        """A copy of the noise, or what a seed stands for [1, …]. Raises ``InputError`` unless one of them is given."""
        if seed is not None and noise is None:
            return make_noise(seed, self.plan.shape(self.plan.noises[0])[1:])[None]
        if noise is None or seed is not None:
            raise InputError("a request has either noise or a seed")
        self._check(self.plan.latent_spec, self.plan.noises[0], noise)
        return noise.copy()

    def check(self, conditions: Mapping[str, Array]) -> None:
        """Raise ``InputError`` unless these are numpy arrays for a request of one sample."""
        self.plan.check_names(conditions)
        for name, (spec, view) in self.plan.given.items():
            self._check(spec, view, conditions[name])

    def _check(self, spec: TensorSpec, view: View, value: Array) -> None:
        sizes = {dim: size for dim, size in zip(spec.shape, self.plan.shape(view), strict=True) if isinstance(dim, str)}
        spec.check(value, sizes)

    def zeros(self) -> dict[str, Array]:
        """Conditions that say nothing."""
        return {name: np.zeros(self.plan.shape(view), spec.dtype) for name, (spec, view) in self.plan.given.items()}

    def shared_digest(self, conditions: Mapping[str, Array]) -> bytes:
        """Stands for what a request brings without a batch axis: requests of different such data share few calls."""
        shared = [conditions[name] for name, (spec, _) in self.plan.given.items() if BATCH not in spec.shape]
        return _digest(shared) if shared else b""


def variants_of(bundle: LoadedBundle, sizes: Sequence[str] | None, texts: Sequence[int] | None) -> tuple[LoadedBundle, ...]:
    """The bundle at each size, number of steps and length of texts, what it was loaded for first; longest texts first."""
    if bundle.bundle is None:
        return (bundle,)
    (own,) = bundle.manifest.variants
    wanted = [own.size] if sizes is None else [str(PictureSize.parse(size)) for size in sizes]
    there = bundle.bundle.manifest
    for size in wanted:
        there.at(size)
    known = {(one.size, one.steps): None for one in (own, *there.variants) if one.size in wanted}
    lengths = sorted(there.texts if texts is None else {find_text(there.texts, text) for text in texts}, reverse=True)
    here = own.size, own.steps, bundle.manifest.settings.get("text_tokens")
    wanted_at = [(*at, text) for at in known for text in lengths or (None,)]
    return tuple(bundle if at == here else bundle.at(*at) for at in wanted_at)


def _digest(arrays: Iterable[Array]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _port(
    engine: Engine, planned: PlannedCall, plan: BindingPlan, place: str, known: Collection[str], *, computes: bool
) -> tuple[Port, int]:
    """Its port, and how many rows it has there. ``known``: as :func:`_comparable`."""
    sizes = dict[str, int]()
    for spec in engine.signature.inputs:
        shape = plan.shape(planned.inputs[spec.name])
        sizes |= {dim: size for dim, size in zip(spec.shape, shape, strict=True) if isinstance(dim, str)}
    apart = [spec for spec in engine.signature.inputs if BATCH not in spec.shape]
    shares = BATCH in sizes and all(planned.inputs[spec.name].buffer in known for spec in apart)
    rows = sizes.pop(BATCH) if shares else 1
    facts = (f"{name}={size}" for name, size in sorted(sizes.items()))
    return Port(" ".join([f"{place}{planned.engine}", *facts]), engine, sizes, shares, computes), rows


def _comparable(plan: BindingPlan) -> set[str]:
    """Buffers of which it is known whether two requests' hold the same: constants, conditions, results of the prologue."""
    known = {name for name, buffer in plan.buffers.items() if buffer.value is not None}
    known |= {name for name in plan.buffers if name.startswith(condition_name(""))}
    return known if plan.prologue is None else known | {view.buffer for view in plan.prologue.outputs.values()}


def _shared(planned: PlannedCall, port: Port, plan: BindingPlan, program: str) -> tuple[tuple[object, ...], bool]:
    """What inputs without a batch axis hold: constants by their bytes, results of the prologue by where they come from.

    The prologue's result for one step depends on the program's times; one for all steps on nothing but the request, and so
    does what is a request's own, which ``asks`` tells.
    """
    shared, asks = list[object](), False
    for spec in port.inputs:
        if port.has_rows(spec):
            continue
        view = planned.inputs[spec.name]
        value = plan.buffers[view.buffer].value
        if value is not None:
            shared.append(_digest([value]))
        else:
            asks = True
            shared.append(view.buffer if view.start is None else (program, view))
    return tuple(shared), asks
