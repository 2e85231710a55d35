"""What calibration asks of a model: its answer at any latents and any told time, and closed loops of Programs.

Fits, searches and measurements go through an :class:`Evaluator` only, so they do not care what the model runs on.

Shapes: ``B`` batch, ``T`` steps, ``G`` groups, ``S`` slots; latents, velocities and features [B, …].
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from cachec.runtime.abi import MAX_BATCH
from cachec.runtime.device import CPU
from cachec.runtime.errors import InputError
from cachec.runtime.program import Program
from cachec.runtime.specs import Array

if TYPE_CHECKING:
    import torch

Time = float | Array  # what the model is told: one number for all, or one each [B]
Conditions = Mapping[str, Array]  # by name, each [B, …]; the second time of flow maps is one of them (``told_besides``)
Numbers = Array | None  # in place of a Program's own, where given


class Evaluator(ABC):
    """A model on some device. Speaks numpy; what numpy has no type for is handed out in float32.

    ``differentiable``: :meth:`evaluate_with_gradients` can be asked for, on ``device``. ``precision``: what it computes
    in. ``max_batch``: the most samples that it takes at once.
    """

    name: ClassVar[str]
    differentiable: ClassVar[bool] = False
    feature: tuple[int, ...] | None = None  # its shape of one sample, where that is known before the model runs
    device: str = CPU
    precision: str = "float32"
    max_batch: int = MAX_BATCH

    @abstractmethod
    def evaluate(self, x: Array, t: Time, conditions: Conditions) -> tuple[Array, Array]:
        """Velocity and feature of the whole model at latents ``x``, told the time ``t``."""

    @abstractmethod
    def tail(self, feature: Array, t: Time, conditions: Conditions) -> Array:
        """Velocity from a feature at the cut."""

    @abstractmethod
    def play(
        self, program: Program, noise: Array, conditions: Conditions, *, coefficients: Numbers = None, timesteps: Numbers = None
    ) -> Array:
        """Final latents of a Program's closed loop.

        Other ``coefficients`` [T, G, S] or told ``timesteps`` [T] than the Program's own are played as they are: nothing is
        built, bound or validated anew.
        """

    def evaluate_with_gradients(
        self, x: "torch.Tensor", t: "torch.Tensor", conditions: Mapping[str, "torch.Tensor"]
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Velocity and feature of the whole model, differentiable in latents and in the scalar ``t``.

        Raises:
            InputError: this evaluator gives no gradients.
        """
        raise self._without_gradients("this fit")

    def check_gradients(self, who: str) -> None:
        """Raise ``InputError`` unless gradients can be asked for: ``who`` wants them. Fits ask before anything runs."""
        if not self.differentiable:
            raise self._without_gradients(who)

    def _without_gradients(self, who: str) -> InputError:
        return InputError(f"{who} needs gradients of the model, which {self.name} does not give: calibrate on its graphs")
