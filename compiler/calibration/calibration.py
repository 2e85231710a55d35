"""What fits read: calibration statistics beside the model that they were made with.

Shapes: ``P`` prompts, ``G`` grid steps (the sampler's, or those of the fine reference), ``K`` computed steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from cachec.compiler.calibration.runs import Denoiser
from cachec.compiler.calibration.statistics import Statistics, check_finite
from cachec.compiler.models.base import LoadedModel, Settings, tensors_from
from cachec.compiler.tables.coefficients import Table
from cachec.passes import Graphs
from cachec.runtime.errors import InputError
from cachec.runtime.specs import Array

CHUNK = 16  # prompts a batch
HELD_OUT_EVERY = 4  # every fourth prompt is kept from fits, and says how good they are


@dataclass(frozen=True, eq=False)
class Calibration:
    """Runs of the uncached model, and the model itself for closed loops.

    ``index`` [P] chooses the prompts that count. ``fine``: the target is the fine reference, and steps are numbered on its
    grid; else the target is the uncached run on its own grid.
    """

    statistics: Statistics
    denoiser: Denoiser
    conditions: Mapping[str, torch.Tensor]
    index: torch.Tensor
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
        return len(self.denoiser.sigmas) - 1

    @cached_property
    def sigmas(self) -> Array:
        """Noise levels [G + 1] of the grid, float64."""
        return self.denoiser.sigmas.double().numpy()

    @property
    def num_elements(self) -> int:
        """Elements of one velocity."""
        return self.statistics.noise[0].numel()

    def select(self, index: torch.Tensor | Sequence[int]) -> "Calibration":
        """Some of the prompts, numbered as they are here."""
        return replace(self, index=self.index[torch.as_tensor(index)])

    def split(self) -> tuple["Calibration", "Calibration"]:
        """The prompts to fit on, and those held out.

        Raises:
            InputError: there are too few prompts to hold one out.
        """
        if self.num_prompts < HELD_OUT_EVERY:
            raise InputError(
                f"{self.num_prompts} calibration prompts are too few to fit on some and to hold one out: give at least "
                f"{HELD_OUT_EVERY}"
            )
        held_out = torch.arange(self.num_prompts) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return self.select(torch.where(~held_out)[0]), self.select(torch.where(held_out)[0])

    def velocity_gram(self) -> Array:
        """Inner products [P, G, G] of the reference's velocities."""
        source = self.statistics.fine_velocity_gram if self.fine else self.statistics.velocity_gram
        assert source is not None
        result: Array = source[self.index].numpy()
        return result

    def feature_gram(self) -> Array:
        """Inner products [P, T, T] of the uncached run's features at the cut."""
        if self.fine:
            raise InputError(
                "features are recorded on the run's own steps only: fit hidden-cut methods without a fine reference"
            )
        result: Array = self.statistics.feature_gram[self.index].numpy()
        return result

    def noise(self) -> torch.Tensor:
        """Where all runs start [P, …]."""
        return self.statistics.noise[self.index]

    def latents(self, node: int) -> torch.Tensor:
        """Reference latents [P, …] before grid step ``node``; ``num_steps`` gives the final ones."""
        if node == 0:
            return self.noise()
        source = self.statistics.fine_latents if self.fine else self.statistics.latents
        assert source is not None
        return source[self.index, node - 1]

    def velocities(self, x: torch.Tensor, timestep: float, step: int) -> torch.Tensor:
        """Velocities [P, …] of the whole model at latents ``x`` [P, …]; ``step`` is for messages.

        Raises:
            InputError: they are not finite.
        """
        parts = []
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            parts.append(self.denoiser.velocity(x[rows], timestep, self._conditions(rows)))
            check_finite(parts[-1], self._prompts(rows), start, step)
        return torch.cat(parts)

    def run(self, table: Table) -> torch.Tensor:
        """Final latents [P, …] of the closed loop: the model at computed steps, the table elsewhere.

        Raises:
            InputError: they are not finite.
        """
        results = []
        for start in range(0, self.num_prompts, CHUNK):
            rows = slice(start, start + CHUNK)
            results.append(self.denoiser.play(table, self.noise()[rows], self._conditions(rows)))
            check_finite(results[-1], self._prompts(rows), start, table.schedule.num_steps)
        return torch.cat(results)

    def errors(self, table: Table) -> Array:
        """Relative L2 errors [P] of the final latents against the reference."""
        return relative_errors(self.run(table), self.latents(self.num_steps))

    def all_conditions(self) -> dict[str, torch.Tensor]:
        """The prompts' conditions, by name [P, …]."""
        return self._conditions(slice(None))

    def _conditions(self, rows: slice) -> dict[str, torch.Tensor]:
        return {name: value[self.index[rows]] for name, value in self.conditions.items()}

    def _prompts(self, rows: slice) -> list[str]:
        return [self.statistics.prompts[i] for i in self.index[rows].tolist()]


def relative_errors(latents: torch.Tensor, reference: torch.Tensor) -> Array:
    """Distances [P] from reference latents [P, …] over the norms of those."""
    error: Array = ((latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)).double().numpy()
    return error


def decibels(errors: Array) -> float:
    """Mean of relative errors [P] in dB; more is better."""
    return float(np.mean(-20 * np.log10(np.maximum(errors, 1e-12))))


def open_calibration(
    statistics: Statistics, model: LoadedModel, split: Graphs, settings: Settings, *, fine: bool = False
) -> Calibration:
    """Statistics with the model that they were made with; ``split`` is the split float32 model.

    Raises:
        InputError: ``fine`` is asked for, and the statistics have no fine reference.
    """
    settings = replace(settings, dtype="float32")
    if fine:
        if statistics.fine_latents is None:
            raise InputError(
                f"calibration {statistics.origin} has no fine reference: make one with cachec calibrate --reference-steps"
            )
        settings = replace(settings, steps=statistics.fine_latents.shape[1])
    conditions = tensors_from(model.encode(statistics.prompts, settings, model.io.conditions))
    return Calibration(statistics, Denoiser(model, split, settings), conditions, torch.arange(len(statistics.prompts)), fine)
