"""How far a run has come off the uncached one, step by step.

Shapes: ``T`` steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cachec.compiler.calibration.metrics import latent_rel_l2
from cachec.runtime.session import Session
from cachec.runtime.specs import Array

Run = tuple[Mapping[str, Array], Array]  # conditions and noise of one prompt


@dataclass(frozen=True)
class ErrorCurve:
    """Relative L2 distance from the uncached latents at the same noise level; ``steps`` count those of the uncached run."""

    steps: tuple[float, ...]
    rel_l2: tuple[float, ...]


def measure_errors(reference: Session, sessions: Mapping[str, Session], runs: Sequence[Run]) -> dict[str, ErrorCurve]:
    """The mean curve of each session over ``runs``; forecasts come in runs, so it has points at their ends."""
    grid = reference.program.sigmas
    values: dict[str, list[list[float]]] = {name: [] for name in sessions}
    levels: dict[str, list[float]] = {}
    for conditions, noise in runs:
        true = np.stack([noise, *(latents for _, latents in trace(reference, conditions, noise))])
        for name, session in sessions.items():
            points = list(trace(session, conditions, noise))
            levels[name] = [sigma for sigma, _ in points]
            values[name].append([latent_rel_l2(latents, at_noise_level(true, grid, sigma)) for sigma, latents in points])
    return {
        name: ErrorCurve(tuple(position(grid, sigma) for sigma in levels[name]), tuple(np.mean(values[name], axis=0).tolist()))
        for name in sessions
    }


def trace(session: Session, conditions: Mapping[str, Array], noise: Array) -> Iterator[tuple[float, Array]]:
    """Run; yields each noise level that the latents reach, and a copy of them there."""
    session.begin(conditions, noise)
    program = session.program
    for instruction in program.instructions:
        session.advance()
        if instruction.moves:
            yield float(program.sigmas[instruction.moves[-1] + 1]), session.latents


def position(sigmas: Array, sigma: float) -> float:
    """Where a noise level lies among ``sigmas`` [T + 1], which fall: 0 at the first, T at the last."""
    return float(np.interp(-sigma, -sigmas, np.arange(len(sigmas))))


def at_noise_level(latents: Array, sigmas: Array, sigma: float) -> Array:
    """Latents of a run [T + 1, …] at any noise level: between two of its steps, Euler moves on a straight line over it."""
    before = min(int(position(sigmas, sigma)), len(sigmas) - 2)
    share = (sigmas[before] - sigma) / (sigmas[before] - sigmas[before + 1])
    result: Array = (1 - share) * latents[before] + share * latents[before + 1]
    return result
