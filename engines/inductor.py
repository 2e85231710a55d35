"""``torch.compile``: graphs are compiled when they first run. For use in the process that has the model.

A bundle holds exported programs, as for eager; loading one costs a compilation, which PyTorch's own cache shortens.
"""

from typing import TYPE_CHECKING, Any

from cachec.engines.eager import ProgramBuilder, ProgramEngine  # it says which extra brings torch where there is none
from cachec.runtime.abi import BATCH
from cachec.runtime.device import Device
from cachec.runtime.specs import Signature

if TYPE_CHECKING:
    import torch


class InductorEngine(ProgramEngine):
    """A program under ``torch.compile``."""

    name = "inductor"

    def __init__(self, module: "torch.nn.Module", signature: Signature, device: Device) -> None:
        import torch

        varied = any(isinstance(size, str) and size != BATCH for spec in signature.inputs for size in spec.shape)
        compiled: Any = torch.compile(module, dynamic=varied)  # with the batch alone, a graph for each batch is faster
        super().__init__(compiled, signature, device)


ENGINE = InductorEngine
BUILDER = ProgramBuilder(InductorEngine)
