"""A module ``tensorrt`` that is made from the API file of 11.0, records every call, and computes with ONNX Runtime.

``Fake().module`` has exactly the classes, methods, properties and enum members that the API file has. Calls and values are
checked as pybind11 does: a wrong number of arguments, an unknown keyword, a ``Path`` for a ``str`` raise ``TypeError``; an
unknown attribute ``AttributeError``. What it does is in ``fake_tensorrt_behaviour`` and ``fake_tensorrt_engine``; what nobody
needed yet raises ``NotImplementedError``. Enum members have other values than TensorRT's: code must not depend on them.

A test sets the fields of ``Fake`` before it calls, and looks into ``calls`` after.
"""

import ctypes
import functools
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import tensorrt_api

METHODS: dict[tuple[str, str], Callable[..., Any]] = {}  # what methods do; (class, method) -> f(fake, self, *values)
READS: dict[tuple[str, str], Callable[..., Any]] = {}  # properties that are worked out; f(fake, self)
WRITES: dict[tuple[str, str], Callable[..., Any]] = {}  # f(fake, self, value) -> what is kept
RANGES = {"Dims": (0, 8), "Dims2": (2, 2), "Dims3": (3, 3), "Dims4": (4, 4)}  # number of extents
CONSTANTS = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}  # the others are called as the member is


class Call(NamedTuple):
    """One call, or one property that was set (then ``method`` ends with ``=``)."""

    cls: str
    method: str
    values: tuple


@dataclass
class Memory:
    """The bytes behind a pointer; a fake GPU puts its own here."""

    def view(self, pointer: int, size: int) -> np.ndarray:
        """``size`` bytes from ``pointer``, to read and write."""
        return np.frombuffer((ctypes.c_ubyte * size).from_address(pointer), np.uint8) if size else np.empty(0, np.uint8)


def at_once(_stream: int, function: Callable[[], None]) -> None:
    """A stream that waits for everything."""
    function()


@dataclass
class Fake:
    """The module, its record, and what is to go wrong.

    ``enqueue(stream, function)`` is called where TensorRT queues work, ``is_capturing(stream)`` is asked before.
    """

    version: str = "11.0.0.114"
    sm: tuple[int, int] = (9, 0)
    enqueue: Callable[[int, Callable[[], None]], None] = at_once
    is_capturing: Callable[[int], bool] = lambda _stream: False
    memory: Memory = field(default_factory=Memory)
    unsupported: frozenset[str] = frozenset()  # operators that the parser refuses
    no_memory_for: frozenset[str] = frozenset()  # of "build", "load", "context"
    no_driver: bool = False
    calls: list[Call] = field(default_factory=list)
    escaped: list[BaseException] = field(default_factory=list)  # raised in callbacks, where TensorRT only prints them
    module: types.ModuleType = field(init=False)

    def __post_init__(self):
        import fake_tensorrt_behaviour  # noqa: F401 — they enter what they do into METHODS
        import fake_tensorrt_engine  # noqa: F401

        self.api = tensorrt_api.load()
        self.module = make_module(self)

    def new(self, name: str, /, **facts: Any) -> Any:
        """An object that only TensorRT makes. ``facts`` are its properties, and what else is to be remembered."""
        cls = getattr(self.module, name)
        made = cls.__new__(cls)
        object.__setattr__(made, "_facts", facts)
        return made

    def called(self, cls: str, method: str) -> list[tuple]:
        """The values of all calls of a method."""
        return [call.values for call in self.calls if (call.cls, call.method) == (cls, method)]

    def log(self, logger: Any, text: str, severity: str = "ERROR") -> None:
        """Tell the program's logger."""
        logger.log(getattr(self.module.ILogger.Severity, severity), text)


def make_module(fake: Fake) -> types.ModuleType:
    module = types.ModuleType("tensorrt")
    module.__version__ = fake.version
    made: dict[str, type] = {}
    for name, kind in fake.api.classes.items():
        if kind.enum:
            made[name] = make_enum(name.split(".")[-1], kind.enum)
    for name in fake.api.classes:
        make_class(fake, name, made)
    for name, cls in made.items():
        if "." not in name:
            setattr(module, name, cls)
    for name in fake.api.constants:
        setattr(module, name, made["DataType"].__members__[CONSTANTS.get(name, name.upper())])
    for name, overloads in fake.api.functions.items():
        setattr(module, name, functools.partial(call, fake, "", name, overloads, None))
    module.nptype = lambda dtype: DTYPES[dtype.name]
    module.volume = lambda shape: int(np.prod([*shape], dtype=np.int64))
    return module


DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
    "INT8": np.int8,
    "UINT8": np.uint8,
}


def make_enum(name: str, members: tuple[str, ...]) -> type:
    """As pybind11 makes them: compared by identity, not integers, not iterable."""

    def as_text(self):
        return f"<{name}.{self.name}: {self.value}>"

    def compare(self, other):
        return type(other) is type(self) and other.value == self.value

    cls = type(
        name,
        (),
        {
            "__init__": lambda self, *_: (_ for _ in ()).throw(TypeError(f"{name}: name a member")),
            "__int__": lambda self: self.value,
            "__index__": lambda self: self.value,
            "__eq__": compare,
            "__hash__": lambda self: hash(self.value),
            "__repr__": as_text,
            "__str__": lambda self: f"{name}.{self.name}",
        },
    )
    cls.__members__ = {}
    for value, key in enumerate(members):
        member = cls.__new__(cls)
        member.name, member.value = key, value
        setattr(cls, key, member)
        cls.__members__[key] = member
    return cls


def make_class(fake: Fake, name: str, made: dict[str, type]) -> type:
    """The class and, before it, its bases."""
    if name in made:
        return made[name]
    kind = fake.api.classes[name]
    bases = tuple(make_class(fake, base, made) for base in kind.bases)
    body: dict[str, Any] = {"__init__": make_init(fake, name, kind.methods["__init__"]), "__setattr__": set_attribute}
    body["_api"] = frozenset((*kind.methods, *kind.properties))
    body["__repr__"] = lambda self: f"<tensorrt.{name} object at {hex(id(self))}>"
    for key, overloads in kind.methods.items():
        if key != "__init__" and not any(hasattr(base, key) and key in base._api for base in bases):
            body[key] = make_method(fake, name, key, overloads)
    for key, (told, writable) in kind.properties.items():
        if key in tensorrt_api.SEVERITIES:
            body[key] = made[tensorrt_api.SEVERITY].__members__[key]
        elif key == "MAX_DIMS":
            body[key] = RANGES["Dims"][1]
        else:
            body[key] = make_property(fake, name, key, told, writable)
    if name == "ILogger":
        body["Severity"] = made[tensorrt_api.SEVERITY]
    if "__len__" in body:
        body["__iter__"] = lambda self: (self[index] for index in range(len(self)))
    made[name] = type(name, bases, {**body, **EXTRA.get(name, {})})
    return made[name]


EXTRA: dict[str, dict[str, Any]] = {  # dunders that TensorRT-RTX's classes have and the API file leaves out
    "Dims": {
        "__eq__": lambda self, other: tuple(self) == tuple(other),
        "__hash__": None,
        "__repr__": lambda self: repr(tuple(self)),
        "__str__": lambda self: str(tuple(self)),
    }
}


def make_init(fake: Fake, name: str, overloads: tuple[tensorrt_api.Overload, ...]) -> Callable[..., None]:
    def __init__(self, *positional, **keywords):
        if not overloads:
            raise TypeError(f"tensorrt.{name}: No constructor defined!")
        object.__setattr__(self, "_facts", {})
        call(fake, name, "__init__", overloads, self, *positional, **keywords)

    return __init__


def make_method(fake: Fake, name: str, key: str, overloads: tuple[tensorrt_api.Overload, ...]) -> Callable[..., Any]:
    def method(self, *positional, **keywords):
        return call(fake, name, key, overloads, self, *positional, **keywords)

    method.__name__ = key
    return method


def make_property(fake: Fake, name: str, key: str, told: str | None, writable: bool) -> property:
    def read(self):
        handler = find(fake, READS, type(self), name, key)
        if handler:
            return handler(fake, self)
        if key in facts_of(self):
            return facts_of(self)[key]
        raise NotImplementedError(f"the fake does not know {name}.{key}")

    def write(self, value):
        if told and not (value is None and told in fake.api.classes):
            value = accept(fake, told, value, f"{name}.{key}")
        fake.calls.append(Call(name, f"{key}=", (value,)))
        handler = find(fake, WRITES, type(self), name, key)
        facts_of(self)[key] = handler(fake, self, value) if handler else value

    return property(read, write if writable else None)


def set_attribute(self, name, value):
    """pybind11's own objects take no new attributes; those of Python subclasses do."""
    own = "_api" in type(self).__dict__
    if own and name not in ("__class__", "_facts") and not isinstance(getattr(type(self), name, None), property):
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
    object.__setattr__(self, name, value)


def facts_of(made: Any) -> dict[str, Any]:
    if "_facts" not in vars(made):
        raise TypeError(f"tensorrt.{type(made).__mro__[1].__name__}.__init__() must be called when overriding __init__")
    return made._facts


def find(fake: Fake, table: dict, cls: type, name: str, key: str) -> Callable[..., Any] | None:
    """What is entered for the object's class, or for an ancestor."""
    nearest = next((k.__name__ for k in cls.__mro__ if k.__name__ in fake.api.classes and "_api" in k.__dict__), name)
    return next((table[kind, key] for kind in fake.api.lineage(nearest) if (kind, key) in table), None)


def call(fake: Fake, name: str, key: str, overloads: tuple, self: Any, *positional: Any, **keywords: Any) -> Any:
    """Choose the overload, record the call, and do it."""
    values = match(fake, f"{name}.{key}", overloads, positional, keywords)
    if self is not None:
        facts_of(self)
    if key == "__init__" or not key.startswith("__"):  # indexing a shape is no call that anybody asks for
        fake.calls.append(Call(name, key, tuple(values)))
    handler = find(fake, METHODS, type(self), name, key)
    if handler is None and key == "__init__":
        return None
    if handler is None:
        raise NotImplementedError(f"the fake does nothing for {name}.{key}")
    return handler(fake, self, *values)


def match(fake: Fake, what: str, overloads: tuple, positional: tuple, keywords: dict[str, Any]) -> list[Any]:
    """The arguments in order, as the first overload that fits takes them."""
    reasons = []
    for overload in overloads:
        reason = overload.misfit(len(positional), keywords)
        if reason is not None:
            reasons.append(reason)
            continue
        given = {parameter.name: value for parameter, value in overload.bound(positional, keywords)}
        try:
            return [convert(fake, parameter, given) for parameter in overload.parameters]
        except TypeError as error:
            reasons.append(str(error))
    raise TypeError(f"{what}(): incompatible function arguments. {'; '.join(reasons)}. Invoked with: {positional}, {keywords}")


def convert(fake: Fake, parameter: tensorrt_api.Parameter, given: dict[str, Any]) -> Any:
    if parameter.name in given:
        value = given[parameter.name]
        nothing = value is None and parameter.default == "None"
        return None if nothing else accept(fake, parameter.type, value, parameter.name)
    member = re.fullmatch(r"<(\w+)\.(\w+): -?\d+>", parameter.default or "")
    if member:
        owner = tensorrt_api.SEVERITY if member[1] == "Severity" else member[1]
        return functools.reduce(getattr, owner.split("."), fake.module).__members__[member[2]]
    return (
        {"None": None, "True": True, "False": False}.get(parameter.default)
        if not parameter.default.isdigit()
        else int(parameter.default)
    )


def accept(fake: Fake, kind: str, value: Any, what: str) -> Any:
    """The value as pybind11 would pass it on; ``TypeError`` if it would not."""
    sequence = re.fullmatch(r"(?:Sequence|list)\[(.+)\]", kind)
    if sequence and not isinstance(value, str | bytes) and hasattr(value, "__getitem__"):
        return [accept(fake, sequence[1], item, what) for item in value]
    if kind in ACCEPTS:
        if ACCEPTS[kind](value):
            return value
    elif kind in fake.api.classes:
        cls = functools.reduce(getattr, kind.split("."), fake.module)
        if isinstance(value, cls):
            if not fake.api.classes[kind].enum:
                facts_of(value)
            return value
        if kind in RANGES and isinstance(value, tuple | list) and RANGES[kind][0] <= len(value) <= RANGES[kind][1]:
            return cls([accept(fake, "SupportsInt", extent, what) for extent in value])
        if kind == "Weights" and isinstance(value, np.ndarray):
            return cls(value)
    raise TypeError(f"{what} must be {kind}, got {type(value).__name__} {value!r}"[:200])


def is_integer(value: Any) -> bool:
    """Not floats, not text, not arrays; ``ctypes.c_void_p`` is none either."""
    return not isinstance(value, str | bytes | float | np.floating | np.ndarray) and (
        hasattr(value, "__index__") or hasattr(value, "__int__")
    )


def is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


ACCEPTS: dict[str, Callable[[Any], bool]] = {
    "SupportsInt": is_integer,
    "int": is_integer,
    "SupportsFloat": lambda value: isinstance(value, float | np.floating) or is_integer(value),
    "float": lambda value: isinstance(value, float | np.floating) or is_integer(value),
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool | np.bool_),
    "Buffer": is_buffer,
    "tuple": lambda value: isinstance(value, tuple),
    "list": lambda value: isinstance(value, list),
    "ndarray": lambda value: isinstance(value, np.ndarray),
    "numpy.ndarray": lambda value: isinstance(value, np.ndarray),
    "slice": lambda value: isinstance(value, slice),
    "object": lambda value: True,
    "Callable": callable,
}
