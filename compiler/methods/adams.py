"""Skip the steps between computed ones by an Adams-Bashforth step.

Citation:
    "PrediT", arXiv 2602.18093: the model's output is forecast by Adams-Bashforth. Of its parts this is the static one; the
    corrector and the horizon that the run decides on are left out. Also AB-Cache, arXiv 2504.10540.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cachec.compiler.methods.base import TableMethod
from cachec.compiler.methods.parameters import Parameters
from cachec.compiler.tables.coefficients import AdvanceTable
from cachec.compiler.tables.samplers import adams_bashforth
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.errors import InputError
from cachec.runtime.program import Cut
from cachec.runtime.specs import Array


@dataclass(frozen=True)
class Adams(TableMethod):
    """Order ``order``, no warm-up of its own, output cut: one slot for each computed velocity.

    The polynomial in sigma through the last ``order`` computed velocities is integrated from one computed step to the next,
    with the true, unequal steps. So it is the plain multistep solver on the computed steps' noise levels, no more: exact on
    velocities of degree ``order - 1`` in sigma once there are ``order`` of them. Order 1 is Euler on the computed steps, the
    same as reuse of velocities. A gap much longer than the one before it amplifies errors.
    """

    name: ClassVar[str] = "adams"
    summary: ClassVar[str] = "skip ahead by Adams-Bashforth on computed velocities (PrediT, static)"
    cut: ClassVar[Cut] = "output"
    default_interval: ClassVar[int] = 6
    order: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.order <= 4:
            raise InputError(f"order is {self.order}; adams takes 1 to 4")

    def table(self, schedule: Schedule, sigmas: Array, parameters: Parameters | None) -> AdvanceTable:
        levels = np.asarray(sigmas, np.float64)
        nodes = np.concatenate([levels[list(schedule.compute)], levels[-1:]])
        return AdvanceTable(schedule, adams_bashforth(nodes, self.order))
