"""A GPU for machines without: tensors that say ``cuda:0``, compute on the CPU, and refuse to meet tensors of the CPU.

It works where PyTorch's functions are called (``__torch_function__``), so that gradients, attention and operators in place are
the CPU's own. What it cannot show: memory, streams, kernels of low precision, TensorRT.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
MIXING = {  # that may be given tensors of both: copies, and reading or writing by index
    *(torch.Tensor.copy_, torch.Tensor.__setitem__, torch.Tensor.__getitem__, torch.Tensor.to, torch.Tensor.type_as),
    *(aten.copy_.default, aten.index.Tensor),
}


class PretendTensor(torch.Tensor):
    """A tensor that says it is on the GPU."""

    device, is_cuda, is_cpu = CUDA, True, False

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to host memory first."
            )
        return self.cpu().numpy()

    def __array__(self, *args, **keywords):
        return self.numpy()

    def __dlpack_device__(self):
        return (2, 0)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


class PretendGpu(TorchFunctionMode):
    """Within it, ``cuda`` in factories, moves and modules gives pretend tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


def _call(func, args, kwargs):
    if (name := getattr(func, "__name__", "")) == "_parse_to" or func is torch.device:  # the first is of Module.to
        return func(*args, **kwargs)
    if name == "_has_compatible_shallow_copy_type":
        return len({isinstance(tensor, PretendTensor) for tensor in args}) == 1
    tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    named = _named_device(func, args, kwargs)
    here = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
    if there and func not in MIXING and any(tensor.dim() for tensor in here):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu! ({func})")
    if named is not None:
        args, kwargs = tuple(map(_on_cpu, args)), {key: _on_cpu(value) for key, value in kwargs.items()}
    with torch._C.DisableTorchFunctionSubclass():
        made = args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)
        into_host = func is torch.Tensor.copy_ and not isinstance(args[0], PretendTensor)
        goes = named.type == "cuda" if named is not None else bool(there) and not into_host
        moved = named is not None and bool(tensors) and goes != isinstance(tensors[0], PretendTensor)
        return pytree.tree_map_only(torch.Tensor, lambda tensor: _placed(tensor, goes=goes, moved=moved), made)


def _placed(tensor, *, goes, moved):
    if isinstance(tensor, PretendTensor) == goes:
        return tensor
    return (tensor.clone() if moved else tensor).as_subclass(PretendTensor if goes else torch.Tensor)  # a move shares no memory


def _named_device(func, args, kwargs):
    """The device that a call names, if it does."""
    if func in (torch.Tensor.cpu, torch.Tensor.cuda):
        return CPU if func is torch.Tensor.cpu else CUDA
    if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
        return args[1].device
    return next((device for device in map(_device, [*args, *kwargs.values()]) if device is not None), None)


def _device(value):
    if isinstance(value, torch.device):
        return value
    return torch.device(value) if isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda") else None


def _on_cpu(value):
    return value if _device(value) is None else CPU
