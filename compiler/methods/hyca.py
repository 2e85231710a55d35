"""Channels in clusters, each forecast by the solver that does best on it.

Citation:
    HyCa, arXiv 2510.04188, ICLR 2026. No code is public, and no formulas could be read: the descriptors, k-means and the kinds
    of solver are the paper's, the solvers' formulas on unequal steps are ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from cachec.compiler.calibration.runs import features_of
from cachec.compiler.methods.base import CodedMethod, TrainingData
from cachec.compiler.methods.hyca_fit import cluster_channels, describe_channels
from cachec.compiler.methods.parameters import Parameters, trained_array
from cachec.compiler.models.base import Settings
from cachec.compiler.tables.coefficients import ForecastTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    from cachec.compiler.graphs.coding import Coding

LABELS, CHOICES = "clusters", "solvers"  # by channel, by cluster


@dataclass(frozen=True)
class HyCa(CodedMethod):
    """Order 1 or 2, as the solvers have it; warm-up 3 steps, 3 slots, hidden cut.

    With the last features F0, F1, F2 at steps a0 > a1 > a2, slopes g = (F0 - F1) / (a0 - a1) and h = (F1 - F2) / (a1 - a2), and
    k = step - a0, w = k / (a0 - a1):

    - ``taylor``: F0 + k g;
    - ``rk`` (Heun, its second slope extrapolated; TaylorSeer's of order 2): F0 + k (g + w (g - h) / 2);
    - ``ab`` (Adams-Bashforth 2 of equal steps): F0 + k p with p = (3 g - h) / 2;
    - ``am`` (Adams-Moulton 3, its new slope predicted by p): F0 + k (5 p + 8 g - h) / 12;
    - ``bdf`` (BDF 2 with the slope g): ((1 + w)^2 F0 - w^2 F1 + (1 + w) k g) / (1 + 2 w).

    ``clusters`` of channels by how these move (first and second differences, energy, jerk, curvature, flatness of the
    spectrum), and for each the solver whose forecasts of uncached runs, at the schedule's own forecast steps, err least; so it
    is fitted to one schedule. Channels are put into the order of their clusters when they are kept, and back. All solvers are
    extrapolations of the same three features: what they differ in is damping, which a cluster gets all of or none.
    """

    name: ClassVar[str] = "hyca"
    summary: ClassVar[str] = "clusters of channels, each by the solver that does best on it (HyCa)"
    needs_training: ClassVar[bool] = True
    num_prompts: ClassVar[int | None] = 8
    default_interval: ClassVar[int] = 6
    min_budget: ClassVar[int] = 3
    clusters: int = 8

    def __post_init__(self) -> None:
        if self.clusters < 1:
            raise InputError(f"clusters is {self.clusters}; it must be at least 1")

    def fit(self, data: TrainingData) -> tuple[dict[str, Array], dict[str, str]]:
        features = features_of(data.train)
        self.check_channels(features.shape[-1])
        labels = cluster_channels(describe_channels(features), self.clusters, seed=data.seed)
        errors = np.stack([self._errors(features, data.schedule, rows) for rows in SOLVERS.values()])  # [solvers, D]
        by_cluster = np.stack([errors[:, labels == one].sum(axis=1) for one in range(labels.max() + 1)])
        choices = by_cluster.argmin(axis=1)
        names = [list(SOLVERS)[choice] for choice in choices]
        sizes = np.bincount(labels)
        said = ", ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
        return {LABELS: labels.astype(np.int64), CHOICES: choices.astype(np.int64)}, {"solvers_by_cluster": said}

    def check_channels(self, channels: int) -> None:
        if self.clusters > channels:
            raise InputError(f"clusters is {self.clusters}, above the {channels} channels of a feature: give fewer")

    @staticmethod
    def _errors(features: Array, schedule: Schedule, solver: "Solver") -> Array:
        """Sums of squares [D] of the forecasts of true features [P, T, N, D]."""
        rows, computed = solver_rows(schedule, solver), features[:, list(schedule.compute)]
        total = np.zeros(features.shape[-1])
        for step in schedule.forecast:
            off = np.tensordot(rows[step].astype(np.float32), computed, (0, 1)) - features[:, step]
            total += np.square(off, dtype=np.float64).sum(axis=(0, 1))
        return total

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> ForecastTable:
        choices = trained_array(parameters, self.name, CHOICES)
        if not np.isin(choices, range(len(SOLVERS))).all():
            raise PredictorError(f"solvers {choices.tolist()} are not the numbers of {', '.join(SOLVERS)}")
        solvers = list(SOLVERS.values())
        return ForecastTable.of_rows(schedule, *(solver_rows(schedule, solvers[choice]) for choice in choices))

    def coding(self, feature: tuple[int, ...], settings: Settings, parameters: Parameters | None) -> "Coding":
        from cachec.compiler.methods.projections import channel_groups

        self.check_channels(feature[-1])
        labels, choices = (trained_array(parameters, self.name, name) for name in (LABELS, CHOICES))
        if labels.shape != (feature[-1],) or set(labels.tolist()) != set(range(len(choices))):
            raise PredictorError(f"clusters of {labels.size} channels do not fit features of {feature[-1]}: train anew")
        return channel_groups(labels)


Solver = Callable[[Array, Array, Array, float, float], Array]  # F0, g and h as rows over the features, k and w


def _bdf(last: Array, g: Array, h: Array, k: float, w: float) -> Array:
    before = last - g * (k / w)
    row: Array = ((1 + w) ** 2 * last - w**2 * before + (1 + w) * k * g) / (1 + 2 * w)
    return row


SOLVERS: Mapping[str, Solver] = {
    "taylor": lambda last, g, h, k, w: last + k * g,
    "rk": lambda last, g, h, k, w: last + k * (g + w * (g - h) / 2),
    "ab": lambda last, g, h, k, w: last + k * (3 * g - h) / 2,
    "am": lambda last, g, h, k, w: last + k * (5 * (3 * g - h) / 2 + 8 * g - h) / 12,
    "bdf": _bdf,
}


def solver_rows(schedule: Schedule, solver: Solver) -> Array:
    """Rows [T, K] of a solver over the computed features. One feature is repeated, of two h is taken to be g."""
    unit, rows = np.eye(len(schedule.compute)), np.zeros((schedule.num_steps, len(schedule.compute)))
    gaps = np.diff(schedule.compute)
    slopes = [np.zeros(len(unit)), *((unit[1:] - unit[:-1]) / gaps[:, None])]
    for step in schedule.forecast:
        newest = max(i for i, computed in enumerate(schedule.compute) if computed < step)
        if newest == 0:
            rows[step] = unit[0]
            continue
        k = step - schedule.compute[newest]
        w = k / (schedule.compute[newest] - schedule.compute[newest - 1])
        rows[step] = solver(unit[newest], slopes[newest], slopes[max(newest - 1, 1)], k, w)
    return rows
