"""One run of a sampler as numbers: what the model is told, and how the latents move.

Every deterministic sampler without clipping is linear in the noise and in the model's outputs (``sampler_probe.py`` finds how).
Divided by the noise's share, the latents are the noise plus weighted outputs, whatever the sampler: ``z_j = x_j / shares[j]``.
There a sampler of Euler's kind, flow Euler or DDIM, takes plain Euler steps along ``clock``.

Shapes: ``T`` steps; node ``j`` is before step ``j``, node ``T`` the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cachec.compiler.tables.sampler_probe import Sampler, euler_of
from cachec.runtime.abi import COMPUTE, TARGET_TIMESTEP
from cachec.runtime.errors import InputError
from cachec.runtime.program import Cut, Program
from cachec.runtime.specs import Array

LEAST_SHARE = 1e-6  # of the noise in the latents; below it they cannot be divided by it
BEGINNING = 1e-4  # by which that noise may differ from unit noise: EulerDiscreteScheduler takes 0.99998 of it


@dataclass(frozen=True, eq=False)
class Sampling:
    """``sigmas`` [T + 1] noise levels, falling; ``timesteps`` [T], what the model is told at each; float32.

    Noise levels are the noise's part of the latents, sigma / (alpha + sigma): those of flows, and between 1 and 0 for all.
    ``rows`` [T, 1 + T] float64 as ``Sampler`` has them, of the model's outputs; ``None``: Euler's steps along ``sigmas``.
    ``graphs``: by step the compute graph that runs it, of a model with several; ``None``: there is one. ``targets`` [T]: the
    second time that flow maps are told, float32.
    """

    sigmas: Array
    timesteps: Array
    rows: Array | None = None
    name: str = "flow Euler"
    graphs: tuple[str, ...] | None = None
    targets: Array | None = None

    @classmethod
    def of(cls, sampler: Sampler, timesteps: Array, *, sign: float = 1.0, graphs: tuple[str, ...] | None = None) -> "Sampling":
        """A probed sampler, and what the model is told. ``sign``: the pipeline hands the sampler so many times the output.

        Latents here are what the model is given: where the sampler scales its input, that is a part of the steps.

        Raises:
            InputError: the sampler forgets the noise that it begins with, so that its steps cannot be put together, or does
                not begin with unit noise.
        """
        scale = np.append(sampler.input_scale, 1.0)
        if abs(begin := scale[0] * sampler.noise_scale - 1) > BEGINNING:
            raise InputError(
                f"{sampler.name} hands the model {1 + begin:.6g} times unit noise at its first step, and a run here begins "
                "with unit noise: take another sampler"
            )
        rows = scale[1:, None] * sampler.rows * np.array([1 / scale[0], *[sign] * sampler.rows.shape[0]])
        if (bad := np.flatnonzero(np.abs(rows[:, 0]) < LEAST_SHARE)).size:
            raise InputError(
                f"after step {bad[0]} of {sampler.name} nothing is left of the noise (prediction_type sample?): its steps "
                "cannot be put together; take a sampler that is told noise or velocities"
            )
        return cls(
            noise_levels(sampler).astype(np.float32),
            np.asarray(timesteps, np.float32),
            _unless_flow(sampler, rows),
            sampler.name,
            graphs,
        )

    @classmethod
    def of_program(cls, program: Program) -> "Sampling":
        """The sampler that a Program which computes every step was lowered from."""
        sigmas, timesteps, num = program.sigmas, program.timesteps, program.num_steps
        named = tuple(one.graph for one in program.instructions if one.computes)
        graphs = None if {*named} == {COMPUTE} else named
        if program.carry is not None and program.gain is not None:
            rows, now = np.zeros((num, 1 + num)), np.eye(1, 1 + num)[0]
            for step in range(num):
                now = program.carry[step].astype(np.float64) * now
                now[1 + step] += program.gain[step]
                rows[step] = now
            return cls(sigmas, timesteps, rows, graphs=graphs, targets=program.target_timesteps)
        if program.moves is not None and program.shares is not None and program.moves.shape[1] == num:
            rows = np.column_stack([program.shares, program.moves]).astype(np.float64)
            return cls(sigmas, timesteps, rows, graphs=graphs, targets=program.target_timesteps)
        return cls(sigmas, timesteps, graphs=graphs, targets=program.target_timesteps)

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def shares(self) -> Array:
        """The noise's share of the latents at each node [T + 1], float64."""
        return np.ones(self.num_steps + 1) if self.rows is None else np.array([1.0, *self.rows[:, 0]])

    @cached_property
    def moves(self) -> Array:
        """Each node's displacement from the noise by every output [T + 1, T], divided by the noise's share; float64."""
        if self.rows is None:
            return np.tri(self.num_steps + 1, self.num_steps, -1) * np.diff(np.asarray(self.sigmas, np.float64))
        moves: Array = np.vstack([np.zeros(self.num_steps), self.rows[:, 1:]]) / self.shares[:, None]
        return moves

    @cached_property
    def clock(self) -> Array:
        """Where a constant output has brought the latents at each node [T + 1], float64: for flows the noise levels."""
        if self.rows is None:
            return np.asarray(self.sigmas, np.float64)
        clock: Array = float(self.sigmas[0]) + self.moves.sum(axis=1)
        return clock

    def levels(self, cut: Cut) -> Array:
        """What methods measure time by [T + 1], float64: features change with the noise level, latents along the clock."""
        return self.clock if cut == "output" else np.asarray(self.sigmas, np.float64)

    @cached_property
    def euler(self) -> tuple[Array, Array] | None:
        """``carry`` and ``gain`` [T] of a sampler of Euler's kind: each step is ``carry * latents + gain * output``."""
        if self.rows is None:
            return np.ones(self.num_steps), np.diff(self.sigmas)
        before = np.vstack([np.eye(1, self.num_steps + 1), self.rows[:-1]])
        return euler_of(before, self.rows)

    def latents(self, noise: Array, outputs: Sequence[Array]) -> Array:
        """Latents [P, …] after as many steps as there are ``outputs`` [P, …], in their precision."""
        node = len(outputs)
        x: Array = noise + np.tensordot(self.moves[node, :node].astype(noise.dtype), np.stack(outputs), 1)
        return x if self.rows is None else (x * x.dtype.type(self.shares[node]))

    def first(self, num: int) -> "Sampling":
        """Its first steps alone."""
        rows = None if self.rows is None else self.rows[:num, : num + 1]
        graphs = None if self.graphs is None else self.graphs[:num]
        targets = None if self.targets is None else self.targets[:num]
        return Sampling(self.sigmas[: num + 1], self.timesteps[:num], rows, self.name, graphs, targets)

    def told_besides(self, step: int, batch: int) -> dict[str, Array]:
        """What a flow map is told at a step beside the time, by name [B]; nothing where no second time is told."""
        return {} if self.targets is None else {TARGET_TIMESTEP: np.full(batch, self.targets[step], np.float32)}


def noise_levels(sampler: Sampler) -> Array:
    """The noise's part of the latents at each node [T + 1], sigma / (alpha + sigma), float64.

    Raises:
        InputError: neither the scheduler's list nor its steps tell it.
    """
    levels = sampler.levels
    if levels is None:
        raise InputError(f"{sampler.name} does not say its noise levels")
    return levels


def _unless_flow(sampler: Sampler, rows: Array) -> Array | None:
    """``None`` where the rows are Euler's steps along the noise levels."""
    levels = noise_levels(sampler)
    plain = np.tri(len(rows)) * np.diff(levels)
    is_flow = np.allclose(rows[:, 0], 1, atol=1e-6) and np.allclose(rows[:, 1:], plain, rtol=0, atol=1e-6)
    return None if is_flow else rows
