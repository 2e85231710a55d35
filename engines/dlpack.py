"""DLPack: arrays that one library lends to another, without a copy (https://dmlc.github.io/dlpack/latest/).

cuda-core has the same, but asks the driver about every address, so that none of it could be tested without a GPU.
"""

import ctypes
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
READ_ONLY = 1  # in the flags of a versioned tensor
KINDS = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}  # DLDataTypeCode by numpy's kind
BFLOAT_CODE = 4
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


_DESTRUCTOR = PYFUNCTYPE(None, c_void_p)
_is_valid = PYFUNCTYPE(c_int, py_object, c_char_p)(("PyCapsule_IsValid", pythonapi))
_is_valid_at = PYFUNCTYPE(c_int, c_void_p, c_char_p)(("PyCapsule_IsValid", pythonapi))  # of a capsule that is going away
_pointer = PYFUNCTYPE(c_void_p, py_object, c_char_p)(("PyCapsule_GetPointer", pythonapi))
_pointer_at = PYFUNCTYPE(c_void_p, c_void_p, c_char_p)(("PyCapsule_GetPointer", pythonapi))
_new = PYFUNCTYPE(py_object, c_void_p, c_char_p, _DESTRUCTOR)(("PyCapsule_New", pythonapi))

_lent: dict[int, tuple[Any, ...]] = {}  # what must live until the borrower is done, by the address of its structure


@_DELETER  # type: ignore[untyped-decorator]
def _delete(address: int) -> None:
    _lent.pop(address, None)


@_DESTRUCTOR  # type: ignore[untyped-decorator]
def _destroy(capsule: int) -> None:
    """A capsule goes away; if it was consumed it has another name, and the consumer deletes."""
    for name in (NAME, VERSIONED_NAME):
        if _is_valid_at(capsule, name):
            _delete(_pointer_at(capsule, name))


def lend(
    owner: Any, pointer: int, shape: tuple[int, ...], dtype: str, device: tuple[int, int], *, versioned: bool = False
) -> Any:
    """A capsule of the C-contiguous array at ``pointer``; ``owner`` is kept until the borrower is done.

    ``device``: what ``__dlpack_device__`` says. ``versioned``: for those who ask with ``max_version`` of 1.0 or more.
    """
    extents = (c_int64 * len(shape))(*shape)
    strides = (c_int64 * len(shape))()
    step = 1
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= shape[axis]
    code, bits = (BFLOAT_CODE, 16) if dtype == BFLOAT16 else (KINDS[np.dtype(dtype).kind], np.dtype(dtype).itemsize * 8)
    tensor = _Tensor(pointer, _Device(*device), len(shape), _Type(code, bits, 1), extents, strides, 0)
    managed = _Versioned(*VERSION, None, _delete, 0, tensor) if versioned else _Managed(tensor, None, _delete)
    address = ctypes.addressof(managed)
    _lent[address] = (managed, extents, strides, owner)
    return _new(address, VERSIONED_NAME if versioned else NAME, _destroy)


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
    name, kind = (VERSIONED_NAME, _Versioned) if _is_valid(capsule, VERSIONED_NAME) else (NAME, _Managed)
    tensor = kind.from_address(_pointer(capsule, name)).tensor
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
    if dtype.lanes == 1 and code == KINDS["b"]:
        return "bool"
    if dtype.lanes != 1 or code not in NAMES:
        raise InputError(
            f"an array of DLPack's type {code} with {bits} bits and {dtype.lanes} lanes was given: convert it first"
        )
    return f"{NAMES[code]}{bits}"
