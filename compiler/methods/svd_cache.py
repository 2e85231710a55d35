"""Extrapolate what features have in a few principal directions of their channels, and repeat the rest.

Citation:
    "SVD-Cache", arXiv 2601.07396: the directions from a decomposition of one run's features, reused for all prompts; the
    energy 0.85 and the smoothing 0.9 are the paper's. No code could be read, and the paper's summary calls the forecast an
    exponential moving average without its formula: here the average is of the slope.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cachec.compiler.calibration.runs import features_of
from cachec.compiler.methods.base import CodedMethod, TrainingData
from cachec.compiler.methods.parameters import Parameters, trained_array
from cachec.compiler.models.base import Settings
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.compiler.graphs.coding import Coding

BASIS = "directions"  # the array of a trained one


@dataclass(frozen=True)
class SvdCache(CodedMethod):
    """Order 1 in the principal part, 0 in the rest; warm-up 2 steps, a slot for each computed step, hidden cut.

    The directions V [r, D] are those of the largest singular values of the features of a few uncached runs, as many as hold
    ``energy`` of the sum of squares. A feature is kept as ``[F V^T, F - F V^T V]``, which adds r / D to a slot. The rest is
    repeated; the coordinates move on by ``m k``, k steps after the last computed one, with the smoothed slope
    m_j = ``beta`` m_{j-1} + (1 - ``beta``) (z_j - z_{j-1}) / (a_j - a_{j-1}). Exact on lines in the directions, from the second
    computed step on. At 0.9 the first slopes, those of the warm-up, count long after they are out of date; and as the average
    never ends, every computed feature keeps its slot.
    """

    name: ClassVar[str] = "svd-cache"
    summary: ClassVar[str] = "extrapolate principal directions of the channels, repeat the rest (SVD-Cache)"
    needs_training: ClassVar[bool] = True
    num_prompts: ClassVar[int | None] = 8
    default_interval: ClassVar[int] = 6
    min_budget: ClassVar[int] = 2
    energy: float = 0.85
    beta: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.energy < 1:
            raise InputError(f"energy is {self.energy}; svd-cache takes a share between 0 and 1")
        if not 0 <= self.beta < 1:
            raise InputError(f"beta is {self.beta}; svd-cache takes 0 up to, but not, 1")

    def fit(self, data: TrainingData) -> tuple[dict[str, Array], dict[str, str]]:
        features = features_of(data.train)
        basis = principal_directions(features.reshape(-1, features.shape[-1]), self.energy)
        return {BASIS: basis}, {"rank": str(len(basis)), "channels": str(basis.shape[1])}

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        last, moving = (np.zeros((schedule.num_steps, len(schedule.compute))) for _ in range(2))
        unit, slopes = np.eye(len(schedule.compute)), smoothed_slopes(schedule, self.beta)
        for step in schedule.forecast:
            newest = max(i for i, computed in enumerate(schedule.compute) if computed < step)
            last[step] = unit[newest]
            moving[step] = unit[newest] + slopes[newest] * (step - schedule.compute[newest])
        return ForecastTable.of_rows(schedule, moving, last)

    def coding(self, feature: tuple[int, ...], settings: Settings, parameters: Parameters | None) -> "Coding":
        from cachec.compiler.methods.projections import channel_bands

        basis = trained_array(parameters, self.name, BASIS)
        if basis.ndim != 2 or basis.shape[1] != feature[-1] or not 0 < len(basis) < feature[-1]:
            raise PredictorError(f"directions {list(basis.shape)} are not some of those of {feature[-1]} channels: train anew")
        return channel_bands(basis)


def principal_directions(rows: Array, energy: float) -> Array:
    """Orthonormal directions [r, D], largest first, that hold this share of the squares of ``rows`` [N, D]; r is below D."""
    wide = np.asarray(rows, np.float64)
    values, vectors = np.linalg.eigh(wide.T @ wide)
    held = np.cumsum(values[::-1].clip(min=0))
    rank = int(np.searchsorted(held, energy * held[-1])) + 1
    return vectors[:, ::-1][:, : min(rank, len(values) - 1)].T.astype(np.float32)


def smoothed_slopes(schedule: Schedule, beta: float) -> list[Array]:
    """The exponential moving average of slopes after every computed step, as coefficients [K] over the computed features."""
    unit = np.eye(len(schedule.compute))
    found = [np.zeros(len(unit))]
    for i in range(1, len(unit)):
        slope = (unit[i] - unit[i - 1]) / (schedule.compute[i] - schedule.compute[i - 1])
        found.append(slope if i == 1 else beta * found[-1] + (1 - beta) * slope)
    return found
