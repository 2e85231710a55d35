"""Calls of what PyTorch runs: a function of tensors by name, which allocates its results, so that they are copied."""

from collections.abc import Callable, Mapping

import torch

from cachec.engines.torch_device import as_tensor, neutral_modes, watching_memory
from cachec.runtime.device import Buffer, Device
from cachec.runtime.engine import Call, ExecutionContext, check_bindings
from cachec.runtime.specs import Signature

Tensors = Mapping[str, torch.Tensor]


class TorchContext(ExecutionContext):
    """Binds buffers as tensors on the same memory. ``function``: all inputs to all outputs."""

    def __init__(self, function: Callable[[Tensors], Tensors], signature: Signature, device: Device) -> None:
        self._function = function
        self._signature, self._device = signature, device

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        check_bindings(self._signature, self._device, inputs, outputs)
        with neutral_modes(self._device.name):
            given, wanted = ({name: as_tensor(buffer) for name, buffer in side.items()} for side in (inputs, outputs))
        return _TorchCall(self._function, given, wanted, self._device.name)


class _TorchCall(Call):
    def __init__(self, function: Callable[[Tensors], Tensors], inputs: Tensors, outputs: Tensors, device: str) -> None:
        self._function, self._inputs, self._outputs, self._device = function, inputs, outputs, device

    def run(self) -> None:
        with neutral_modes(self._device), torch.no_grad():
            with watching_memory("a call"):
                results = self._function(self._inputs)
            for name, buffer in self._outputs.items():
                buffer.copy_(results[name])
