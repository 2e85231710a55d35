"""DLPack: arrays that one library lends to another, without a copy (https://dmlc.github.io/dlpack/latest/).

cuda-core has the same, but asks the driver about every address, so that none of it could be tested without a GPU.
"""

import ctypes
import math
from ctypes import (
    CFUNCTYPE,
    POINTER,
    PYFUNCTYPE,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    py_object,
    pythonapi,
)
from dataclasses import dataclass
from typing import Any

import numpy as np

from cachec.runtime.errors import InputError
from cachec.runtime.specs import BFLOAT16

CPU, CUDA, CUDA_MANAGED = 1, 2, 13  # DLDeviceType
VERSION = (1, 0)  # the newest that is spoken here
NAME, VERSIONED_NAME = b"dltensor", b"dltensor_versioned"  # of capsules that nobody has consumed yet
NUMPY_HAS_VERSIONS = np.lib.NumpyVersion(np.__version__) >= "2.1.0"
BFLOAT_CODE, BOOL_CODE = 4, 6  # DLDataTypeCode
NAMES = {0: "int", 1: "uint", 2: "float", BFLOAT_CODE: "bfloat", 5: "complex"}


class _Device(ctypes.Structure):
    _fields_ = (("type", c_int32), ("index", c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", c_uint8), ("bits", c_uint8), ("lanes", c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("device", _Device),
        ("ndim", c_int32),
        ("dtype", _Type),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),  # in elements; null if C-contiguous
        ("byte_offset", c_uint64),
    )


_DELETER = CFUNCTYPE(None, c_void_p)


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", c_void_p), ("deleter", _DELETER))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", c_uint32),
        ("minor", c_uint32),
        ("context", c_void_p),
        ("deleter", _DELETER),
        ("flags", c_uint64),
        ("tensor", _Tensor),
    )


_is_valid = PYFUNCTYPE(c_int, py_object, c_char_p)(("PyCapsule_IsValid", pythonapi))
_pointer = PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", pythonapi))


def lend(
    owner: Any, pointer: int, shape: tuple[int, ...], dtype: str, device: tuple[int, int], *, versioned: bool = False
) -> Any:
    """A capsule of the C-contiguous array at ``pointer``; ``owner`` is kept until the borrower is done.

    numpy makes it, of an array at that address which is never looked at, and is then corrected: a destructor of our own would
    lose the exception that is being raised when a capsule goes away.

    ``device``: what ``__dlpack_device__`` says. ``versioned``: for those who ask with ``max_version`` of 1.0 or more.
    """
    kind = np.dtype("uint16" if dtype == BFLOAT16 else dtype)
    memory: Any = (c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(pointer)
    memory.owner = owner
    array: Any = np.ndarray(shape, kind, memory)
    capsule = array.__dlpack__(max_version=VERSION) if versioned and NUMPY_HAS_VERSIONS else array.__dlpack__()
    tensor = _tensor(capsule)
    tensor.device = _Device(*device)
    if dtype == BFLOAT16:
        tensor.dtype.code = BFLOAT_CODE
    return capsule


def _tensor(capsule: Any) -> _Tensor:
    """What a capsule holds that nobody has consumed yet."""
    name, kind = (VERSIONED_NAME, _Versioned) if _is_valid(capsule, VERSIONED_NAME) else (NAME, _Managed)
    tensor: _Tensor = kind.from_address(_pointer(capsule, name)).tensor
    return tensor


@dataclass(frozen=True, eq=False)
class Borrowed:
    """An array of another library; its memory stays as long as this does. Strides are not kept: see ``is_contiguous``."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    device: tuple[int, int]
    is_contiguous: bool
    lender: Any


def borrow(value: Any, stream: int | None = None) -> Borrowed:
    """What ``value`` lends; work queued in ``stream`` from now on comes after what its library still does to it.

    Raises:
        InputError: the library refuses, or its dtype has no name here.
    """
    try:
        capsule = value.__dlpack__(**({} if stream is None else {"stream": stream}), max_version=VERSION)
    except TypeError:  # it is older than max_version
        capsule = value.__dlpack__() if stream is None else value.__dlpack__(stream=stream)
    except BufferError as error:
        raise InputError(f"a {type(value).__name__} cannot be borrowed: {error}") from error
    tensor = _tensor(capsule)
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    return Borrowed(
        (tensor.data or 0) + tensor.byte_offset,
        shape,
        _dtype_name(tensor.dtype),
        (tensor.device.type, tensor.device.index),
        strides is None or is_contiguous(shape, strides),
        capsule,  # never consumed: when it goes away, the lender's own destructor deletes
    )


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Do elements lie in C's order without gaps? ``strides`` in elements; those of axes of one element do not matter."""
    step = 1
    if 0 in shape:
        return True
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent > 1 and stride != step:
            return False
        step *= extent
    return True


def _dtype_name(dtype: _Type) -> str:
    code, bits = int(dtype.code), int(dtype.bits)
    if dtype.lanes == 1 and code == BOOL_CODE:
        return "bool"
    if dtype.lanes != 1 or code not in NAMES:
        raise InputError(
            f"an array of DLPack's type {code} with {bits} bits and {dtype.lanes} lanes was given: convert it first"
        )
    return f"{NAMES[code]}{bits}"
