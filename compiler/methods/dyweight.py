"""A multistep solver whose weights, and the times that it tells the model, are trained through the whole sampling.

Citation:
    "DyWeight", arXiv 2603.11607; the recursion and the released rows are those of Westlake-AGI-Lab/DyWeight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.methods.base import Method, TableMethod
from cachec.compiler.methods.gram import Gram, schedule_facts
from cachec.compiler.methods.parameters import Parameters, trained_array
from cachec.compiler.methods.released import Released, check_names, one_file, read_tensors
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError, PredictorError, unknown_name
from cachec.runtime.program import Cut
from cachec.runtime.specs import Array

THETA, SCALES = "theta", "scales"
LEVELS, TOLD = "levels", "told"  # what the sampler tells the model, at which levels of its clock; released rows: the levels


@dataclass(frozen=True)
class DyWeight(TableMethod):
    """Weights over the last ``window`` computed velocities; output cut, a slot for each computed velocity, no warm-up.

    With nodes n_0 > n_1 > … of the computed steps on the sampler's clock and s_0 = n_0, at the i-th computed step the model is
    told ``scale_i`` times the time of s_i; then x moves by d sum_j theta_ij v_j with d = n_{i+1} - s_i, and s_{i+1} is s_i + d
    sum_j theta_ij: where the weights do not sum to one, the solver knows that it is elsewhere. Trained by AdamW (``updates`` of
    ``batch`` prompts at ``rate``, falling to nothing; ``decay``) on the squared error of the final latents, from iPNDM of order
    ``window``; scales lie between 0.5 and 1.5. Two weights and a scale a step are fewer numbers than ``bns`` or ``gram`` have;
    fitted to one model, sampler and schedule, by running the model forwards and backwards at every update. Exact on constants
    before it is trained.
    """

    name: ClassVar[str] = "dyweight"
    summary: ClassVar[str] = "two weights and a told time a step, trained through the sampling (DyWeight)"
    cut: ClassVar[Cut] = "output"
    needs_calibration: ClassVar[bool] = True
    schedule_bound: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True
    released: ClassVar[str | None] = (
        "dyweight_flux/checkpoints/dyweight_nfe{3,5,7}.pt of Westlake-AGI-Lab/DyWeight, for FLUX.1-dev"
    )
    default_interval: ClassVar[int] = 7
    window: int = 2
    updates: int = 120
    batch: int = 8
    rate: float = 5e-3
    decay: float = 0.05

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("updates", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.window > 4:
            raise InputError(f"window is {self.window}; dyweight begins with iPNDM, which has orders up to 4")
        if not self.rate > 0 or not self.decay >= 0:
            raise InputError(f"rate is {self.rate} and decay {self.decay}; they must be more than 0, and not negative")

    def draft(self) -> Method:
        return Gram(polish=0)

    def calibrate(self, calibration: Calibration, schedule: Schedule) -> Parameters:
        calibration.evaluator.check_gradients(self.name)
        from cachec.compiler.methods.dyweight_training import train_dyweight

        sampling = calibration.sampling
        theta, scales = train_dyweight(
            calibration, schedule, window=self.window, updates=self.updates, batch=self.batch, rate=self.rate, decay=self.decay
        )
        arrays = {THETA: theta, SCALES: scales, LEVELS: sampling.clock[:-1], TOLD: sampling.timesteps.astype(np.float64)}
        return Parameters(arrays, schedule_facts(self.name, calibration, schedule), calibration.origin)

    def check_budgets(self, parameters: Parameters | None, budgets: Sequence[int]) -> None:
        if parameters is not None:
            for budget in budgets:
                self._check_number(parameters, budget)

    def _check_number(self, parameters: Parameters, computed: int) -> None:
        theta, scales = (trained_array(parameters, self.name, name) for name in (THETA, SCALES))
        if scales.ndim != 1 or theta.shape != (len(scales), len(scales)):
            raise PredictorError(f"{parameters.origin}: rows {list(theta.shape)} and scales {list(scales.shape)} do not fit")
        if len(scales) != computed:
            raise PredictorError(
                f"{parameters.origin} is for {len(scales)} computed steps, and {computed} are asked for: give --budget "
                f"{len(scales)}, or a schedule of so many"
            )

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> AdvanceTable:
        theta, scales = (trained_array(parameters, self.name, name) for name in (THETA, SCALES))
        assert parameters is not None, "it has arrays"
        self._check_number(parameters, len(schedule.compute))
        fitted = parameters.facts.get("schedule")
        if fitted not in (None, ",".join(map(str, schedule.compute))):
            raise PredictorError(
                f"{parameters.origin} was fitted to steps {fitted}, wanted {schedule}: fit it to this schedule"
            )
        nodes = np.asarray(sigmas, np.float64)[[*schedule.compute, schedule.num_steps]]
        rows, reached = multistep_rows(theta, nodes)
        if LEVELS in parameters.arrays:
            levels, told = (np.asarray(parameters.arrays[name], np.float64) for name in (LEVELS, TOLD))
            return AdvanceTable(schedule, rows, scales * np.interp(reached, levels[::-1], told[::-1]))
        return AdvanceTable(schedule, rows, scales * reached)

    @classmethod
    def read_released(cls, paths: Sequence[Path], options: Mapping[str, str]) -> Released:
        """A state of ``DyweightParams``: ``theta`` [K, K], of which the last two columns of each row count, and ``phi`` [K]."""
        if options:
            raise unknown_name("option of import dyweight", next(iter(options)), ())
        arrays, metadata = read_tensors(path := one_file(paths, cls.name))
        arrays = {name: value for name, value in arrays.items() if name not in ("tril_mask", "win_mask")}
        if "phi" not in arrays or arrays["phi"].ndim != 1:
            raise PredictorError(f"{path} holds no phi of DyWeight: it has {sorted(arrays)}")
        num = len(arrays["phi"])
        check_names(path, arrays, {"theta": (num, num), "phi": (num,)})
        theta = np.triu(np.tril(arrays["theta"].astype(np.float64)), -1)
        scales = 0.5 + 1 / (1 + np.exp(-arrays["phi"].astype(np.float64)))
        facts = {"computed": str(num), "released_for": "FLUX.1-dev, told its noise level"}
        return Released({THETA: theta, SCALES: scales}, facts, metadata.get("license", "none stated"))


def multistep_rows(theta: Array, nodes: Array) -> tuple[Array, Array]:
    """Rows [K, K] of all moves so far, and where the solver believes to be [K], from ``theta`` [K, K] and ``nodes`` [K + 1]."""
    num = len(theta)
    rows, reached, now = np.zeros((num, num)), np.zeros(num), float(nodes[0])
    for i in range(num):
        move = nodes[i + 1] - now
        reached[i] = now
        rows[i] = (rows[i - 1] if i else 0.0) + move * theta[i] * (np.arange(num) <= i)
        now += float(move * theta[i, : i + 1].sum())
    return rows, reached
