"""Free coefficients, trained by gradient descent through the whole sampling.

Citation:
    Shaul et al., "Bespoke Non-Stationary Solvers for Fast Sampling of Diffusion and Flow Models", ICML 2024,
    arXiv 2403.01329. The time steps are not trained here, so that coefficients can be compared at the same time steps.
"""

from dataclasses import dataclass
from typing import ClassVar

from cachec.compiler.calibration.calibration import Calibration
from cachec.compiler.methods.base import Method, TableMethod
from cachec.compiler.methods.gram import Gram, fitted_table, schedule_facts
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.program import Cut
from cachec.runtime.specs import Array


@dataclass(frozen=True)
class Bns(TableMethod):
    """The same form as ``gram`` (output cut, a slot for each computed velocity), but trained by Adam on the final latents.

    Starts from Adams-Bashforth 2; ``updates`` of ``batch`` prompts, at a learning rate that falls from ``rate`` to nothing
    (cosine); the loss is the mean log squared error, which is PSNR. Slow to fit: every update runs the model forwards and
    backwards at every computed step. Exact on nothing.
    """

    name: ClassVar[str] = "bns"
    summary: ClassVar[str] = "free coefficients trained by Adam through the sampling (BNS)"
    cut: ClassVar[Cut] = "output"
    needs_calibration: ClassVar[bool] = True
    schedule_bound: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True
    default_interval: ClassVar[int] = 7
    updates: int = 120
    batch: int = 8
    rate: float = 5e-3

    def __post_init__(self) -> None:
        for name in ("updates", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.rate > 0:
            raise InputError(f"rate is {self.rate}; it must be more than 0")

    def draft(self) -> Method:
        return Gram(polish=0)  # what BNS converges to, nearly, at a thousandth of the price

    def calibrate(self, calibration: Calibration, schedule: Schedule) -> Parameters:
        calibration.evaluator.check_gradients(self.name)
        from cachec.compiler.methods.bns_training import train_rows

        rows = train_rows(calibration, schedule, updates=self.updates, batch=self.batch, rate=self.rate)
        return Parameters({"rows": rows}, schedule_facts(self.name, calibration, schedule), calibration.origin)

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> AdvanceTable:
        return fitted_table(self.name, schedule, parameters)
