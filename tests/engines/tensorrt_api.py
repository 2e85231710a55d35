"""The Python API of TensorRT 11.0, from ``tests/data``: classes with inherited members, overloads, enum members, functions.

What the file does not say is here, each with its reason: ``MODULE_FACTS``, ``CONSTANT_TYPE``; and the types of properties,
which are taken from TensorRT-RTX (see ``tensorrt_properties``).
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tensorrt_properties import FILE as PROPERTIES
from tensorrt_properties import plain_name

FILE = Path(__file__).parent.parent / "data" / "tensorrt-11.0-api.json"

MODULE_FACTS = {  # written in Python in the package's __init__.py, while the file holds what is compiled
    "__version__": "the version of the wheel",
    "__name__": "every module has it",
    "nptype": "numpy's type of a DataType",
    "volume": "number of elements of a shape",
}
CONSTANT_TYPE = "DataType"  # of trt.float32 and the others
NESTED = ("Severity",)  # the only classes inside classes; the file has them as methods without a signature
SEVERITY = "ILogger.Severity"
SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")  # in this order, from 0; attributes of ILogger, too
ENUM_MEMBERS = ("name", "value", "__int__", "__index__", "__members__")  # of every enum of pybind11; it cannot be iterated
OBJECT_MEMBERS = ("__class__", "__doc__", "__name__", "__module__")
ALIASES = {"IParserError": "ParserError", "IBuilder": "Builder", "IRefitter": "Refitter"}  # C++ names in signatures


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, its type as the file has it without namespaces, and its default as text."""

    name: str
    type: str
    default: str | None = None


@dataclass(frozen=True)
class Overload:
    """One way to call: the parameters without ``self``, and what is returned."""

    parameters: tuple[Parameter, ...]
    returns: str

    def misfit(self, positional, keywords):
        """Why a call with so many positional arguments and these keywords does not fit; ``None`` if it does."""
        names = [parameter.name for parameter in self.parameters]
        if positional > len(names):
            return f"takes {len(names)} arguments, not {positional}"
        for name in keywords:
            if name not in names[positional:]:
                known = "is given twice" if name in names else f"is not one of {names}"
                return f"keyword {name} {known}"
        given = {*names[:positional], *keywords}
        missing = [p.name for p in self.parameters if p.name not in given and p.default is None]
        return f"lacks {missing}" if missing else None

    def bound(self, positional, keywords):
        """Pairs of a parameter and what was given for it."""
        by_name = {parameter.name: parameter for parameter in self.parameters}
        return [*zip(self.parameters, positional, strict=False), *((by_name[name], value) for name, value in keywords.items())]


@dataclass(frozen=True)
class Class:
    """A class with what it inherits. Enums have ``enum`` only."""

    name: str
    bases: tuple[str, ...]
    enum: tuple[str, ...] = ()
    methods: dict[str, tuple[Overload, ...]] | None = None  # a method without overloads takes anything
    properties: dict[str, tuple[str | None, bool]] | None = None  # name -> its type, can it be set?

    def has(self, name):
        if self.enum:
            return name in (*self.enum, *ENUM_MEMBERS, *OBJECT_MEMBERS)
        return name in self.methods or name in self.properties or name in OBJECT_MEMBERS


class Api:
    """``classes``, ``functions`` (overloads by name) and ``constants`` (names of ``DataType``) of the module."""

    def __init__(self, raw, properties):
        self.source = raw["source"]
        self._raw, self._properties = raw["classes"], properties
        self.classes = {name: self._class(name) for name in raw["classes"]}
        self.classes[SEVERITY] = Class(SEVERITY, (), SEVERITIES)
        self.functions = {name: tuple(map(parse, texts)) for name, texts in raw["functions"].items()}
        self.constants = tuple(raw["constants"])

    def _class(self, name):
        raw = self._raw[name]
        if "enum" in raw:
            return Class(name, (), tuple(raw["enum"]))
        methods, properties = {}, {}
        for ancestor in reversed(self.lineage(name)):
            known = self._properties.get(ancestor, {})
            for key, texts in self._raw[ancestor]["methods"].items():
                if key not in NESTED:
                    methods[key] = tuple(map(parse, texts))
            for key in self._raw[ancestor]["properties"]:
                severity = (SEVERITY, False) if key in SEVERITIES else (None, True)
                kind, writable = known.get(key) or properties.get(key) or severity
                properties[key] = (ALIASES.get(kind, kind), writable)
        methods["__init__"] = tuple(map(parse, raw["methods"]["__init__"]))
        return Class(name, tuple(raw["bases"]), (), methods, properties)

    def lineage(self, name):
        """The class and its ancestors, nearest first."""
        found = [name]
        for base in self._raw.get(name, {"bases": ()})["bases"]:
            found += [ancestor for ancestor in self.lineage(base) if ancestor not in found]
        return found

    def module_has(self, name):
        return name in self.classes or name in self.functions or name in self.constants or name in MODULE_FACTS

    @functools.cached_property
    def distinctive(self):
        """Names of members that nothing but TensorRT has: made of several words."""
        members = {key for kind in self.classes.values() if not kind.enum for key in (*kind.methods, *kind.properties)}
        return frozenset(name for name in members if "_" in name.strip("_") and not name.startswith("_"))


@functools.cache
def load():
    return Api(json.loads(FILE.read_text()), json.loads(PROPERTIES.read_text())["properties"])


def parse(text):
    """``f(self: A, b: C = 0) -> D`` as an overload."""
    match = re.fullmatch(r"\w+\((.*)\) -> (.+)", text, re.DOTALL)
    if match is None:
        raise ValueError(f"signature {text!r} cannot be read")
    parameters = [parameter(part) for part in split(match[1])]
    if parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    return Overload(tuple(parameters), type_name(match[2]))


def parameter(text):
    """``a: B = c``."""
    name, _, rest = text.partition(":")
    kind, equals, default = rest.partition(" = ")
    return Parameter(name.strip(), type_name(kind.strip()), default.strip() if equals else None)


def type_name(text):
    text = plain_name(text)
    for prefix in ("typing_extensions.", "typing.", "collections.abc.", "numpy."):
        text = text.replace(prefix, "")
    return ALIASES.get(text, text)


def split(text):
    """The parts between the commas that stand in no brackets."""
    parts, depth, begin = [], 0, 0
    for place, sign in enumerate(text):
        depth += (sign in "([<") - (sign in ")]>")
        if sign == "," and depth == 0:
            parts.append(text[begin:place])
            begin = place + 1
    return [part.strip() for part in (*parts, text[begin:]) if part.strip()]
