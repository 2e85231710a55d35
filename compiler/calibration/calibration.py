"""What fits read: calibration statistics beside an evaluator of the model that they were made with.

Shapes: ``P`` prompts, ``G`` grid steps (the sampler's, or those of the fine reference), ``K`` computed steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cachec.compiler.calibration.evaluator import Conditions, Evaluator
from cachec.compiler.calibration.runs import CHUNK, Subject, check_finite
from cachec.compiler.calibration.statistics import Statistics
from cachec.compiler.calibration.uses import Use
from cachec.compiler.tables.coefficients import Table
from cachec.compiler.tables.lower import lower
from cachec.compiler.tables.sampling import Sampling
from cachec.runtime.errors import InputError
from cachec.runtime.program import Program, ProgramKey, hash_sigmas
from cachec.runtime.specs import Array


@dataclass(frozen=True, eq=False)
class Calibration:
    """Runs of the uncached model, and the model itself for closed loops.

    ``index`` [P] chooses the prompts that count. ``fine``: the target is the fine reference, and steps are numbered on its
    grid; else the target is the uncached run on its own grid.
    """

    statistics: Statistics
    evaluator: Evaluator
    sampling: Sampling
    conditions: Conditions
    index: Array
    fine: bool = False

    @property
    def origin(self) -> str:
        return self.statistics.origin

    @property
    def num_prompts(self) -> int:
        return len(self.index)

    @property
    def num_steps(self) -> int:
        """Number of grid steps."""
        return self.sampling.num_steps

    @cached_property
    def sigmas(self) -> Array:
        """Noise levels [G + 1] of the grid, float64."""
        return self.sampling.sigmas.astype(np.float64)

    @property
    def num_elements(self) -> int:
        """Elements of one velocity."""
        return int(self.statistics.noise[0].size)

    def select(self, index: Array | Sequence[int]) -> "Calibration":
        """Some of the prompts, numbered as they are here."""
        return replace(self, index=self.index[np.asarray(index, np.int64)])

    def of(self, use: Use) -> "Calibration":
        """The prompts that are there for one use.

        Raises:
            InputError: there is none.
        """
        prompts = self.statistics.prompts
        prompts.check([use], self.origin)
        return self.select([place for place, prompt in enumerate(self.index) if prompts.uses[prompt] == use])

    def velocity_gram(self) -> Array:
        """Inner products [P, G, G] of the reference's velocities."""
        source = self.statistics.fine_velocity_gram if self.fine else self.statistics.velocity_gram
        assert source is not None
        return source[self.index]

    def feature_gram(self) -> Array:
        """Inner products [P, T, T] of the uncached run's features at the cut.

        Raises:
            InputError: the target is the fine reference.
        """
        if self.fine:
            raise InputError(
                "features are recorded on the run's own steps only: fit hidden-cut methods without a fine reference"
            )
        return self.statistics.feature_gram[self.index]

    def noise(self) -> Array:
        """Where all runs start [P, …]."""
        return self.statistics.noise[self.index]

    def latents(self, node: int) -> Array:
        """Reference latents [P, …] before grid step ``node``; ``num_steps`` gives the final ones.

        Of prompts to choose schedules by there are no others.
        """
        if node == 0:
            return self.noise()
        if node == self.num_steps:
            ends: Array = self.statistics.ends(fine=self.fine)[self.index]
            return ends
        source = self.statistics.fine_latents if self.fine else self.statistics.latents
        assert source is not None
        latents: Array = source[self.index, node - 1]
        return latents

    def velocities(self, x: Array, timestep: float, step: int) -> Array:
        """Velocities [P, …] of the whole model at latents ``x`` [P, …]; ``step`` is of this grid.

        Raises:
            InputError: they are not finite.
        """

        def velocity(rows: slice) -> Array:
            besides = self.sampling.told_besides(step, len(x[rows]))
            return self.evaluator.evaluate(x[rows], timestep, {**self._conditions(rows), **besides})[0]

        return self._in_chunks(velocity, step)

    def play(self, program: Program, noise: Array | None = None) -> Array:
        """Final latents [P, …] of a Program's closed loop, from the runs' own ``noise`` unless told.

        Raises:
            InputError: they are not finite.
        """
        noise = self.noise() if noise is None else noise

        def final(rows: slice) -> Array:
            return self.evaluator.play(program, noise[rows], self._conditions(rows))

        return self._in_chunks(final, program.num_steps)

    def errors(self, table: Table) -> Array:
        """Relative L2 errors [P] of the final latents of a table's closed loop, against the reference.

        Raises:
            InputError: the latents are not finite.
        """
        return relative_errors(self.play(self.program(table)), self.latents(self.num_steps))

    def program(self, table: Table) -> Program:
        """A table as a Program on this grid, to be played here."""
        key = ProgramKey(self.num_steps, hash_sigmas(self.sampling.sigmas), {})
        return lower(table, key, self.sampling)

    def all_conditions(self) -> dict[str, Array]:
        """The prompts' conditions, by name [P, …]."""
        return self._conditions(slice(None))

    def _in_chunks(self, evaluate: Callable[[slice], Array], step: int) -> Array:
        parts = []
        chunk = min(CHUNK, self.evaluator.max_batch)
        for start in range(0, self.num_prompts, chunk):
            rows = slice(start, start + chunk)
            parts.append(evaluate(rows))
            check_finite(parts[-1], [self.statistics.prompts.prompts[i] for i in self.index[rows]], start, step)
        return np.concatenate(parts)

    def _conditions(self, rows: slice) -> dict[str, Array]:
        return {name: value[self.index[rows]] for name, value in self.conditions.items()}


def relative_errors(latents: Array, reference: Array) -> Array:
    """Distances [P] from reference latents [P, …] over the norms of those, float64."""
    off, size = (values.reshape(len(values), -1).astype(np.float64) for values in (latents - reference, reference))
    error: Array = np.linalg.norm(off, axis=1) / np.linalg.norm(size, axis=1)
    return error


def decibels(errors: Array) -> float:
    """Mean of relative errors [P] in dB; more is better."""
    return float(np.mean(-20 * np.log10(np.maximum(errors, 1e-12))))


def open_calibration(statistics: Statistics, subject: Subject, evaluator: Evaluator, *, fine: bool = False) -> Calibration:
    """Statistics with an evaluator of the model that they were made with.

    Raises:
        InputError: ``fine`` is asked for, and the statistics have no fine reference.
    """
    sampling = subject.own_sampling
    if fine:
        if statistics.fine_latents is None:
            raise InputError(
                f"calibration {statistics.origin} has no fine reference: make one with cachec calibrate --reference-steps"
            )
        sampling = subject.sampling(statistics.fine_latents.shape[1])
    prompts = statistics.prompts.prompts
    return Calibration(statistics, evaluator, sampling, subject.encode(prompts), np.arange(len(prompts)), fine)
