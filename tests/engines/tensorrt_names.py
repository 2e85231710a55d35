"""What the names in checked code are: the types, and the attributes of each (see ``tensorrt_checker`` for the conventions)."""

import ast
import difflib
import functools
import re
from dataclasses import dataclass, field

import tensorrt_api

MODULE_NAMES = ("trt", "_trt", "tensorrt")  # always the module
USUAL_NAMES = ("library", "_library")  # the module, unless annotated with something else
ELEMENTS = ("list", "Sequence", "Iterable", "Iterator", "Generator", "set", "frozenset", "deque")  # the first parameter
MAPS = ("dict", "Mapping", "MutableMapping", "OrderedDict")
WRAPPERS = ("Optional", "Final", "ClassVar", "Annotated")
NEAR = 0.88  # of difflib: one changed digit or letter in a long name


@dataclass(frozen=True)
class Type:
    """What an expression is: ``kind`` module, class, instance, method, function, lost, list, tuple, map, own class, …"""

    kind: str
    name: str = ""
    items: tuple = ()
    of: object = None  # overloads of a method or function; the record of something of these files

    def holds(self):
        """Is a TensorRT object in it?"""
        return self.kind in ("instance", "lost") or any(item.holds() for item in self.items)


PLAIN, UNKNOWN, FOREIGN, MODULE = Type("plain"), Type("unknown"), Type("foreign"), Type("module")


def instance(name):
    return Type("instance", name)


def listed(item):
    return Type("list", items=(item,))


@dataclass
class OwnClass:
    """A class of the checked files."""

    name: str
    bases: list = field(default_factory=list)  # Types
    fields: dict = field(default_factory=dict)  # annotated or inferred
    declared: set = field(default_factory=set)  # names of the annotated ones
    order: list = field(default_factory=list)  # of the fields of a dataclass
    methods: dict = field(default_factory=dict)


@dataclass
class OwnFunction:
    """A function or method of the checked files."""

    node: ast.FunctionDef
    owner: OwnClass | None = None

    def parameters(self):
        arguments = self.node.args
        return [*arguments.posonlyargs, *arguments.args]

    def bound_to_object(self):
        return self.owner is not None and not self.decorated("staticmethod")

    def decorated(self, *names):
        return any(ast.unparse(d).split("(")[0].split(".")[-1] in names for d in self.node.decorator_list)


@functools.cache
def closest(name, names):
    near = difflib.get_close_matches(name, [n for n in names if not n.startswith("__")], n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def similar(name, names):
    return closest(name, tuple(names))


@functools.cache
def nearest(name):
    """Names that only TensorRT has and that ``name`` is, or is one slip away from: one or none."""
    if name.startswith("_") or "_" not in name:
        return []
    candidates = [
        known for known in tensorrt_api.load().distinctive if abs(len(known) - len(name)) <= 1 or known == f"{name}_v2"
    ]
    return difflib.get_close_matches(name, candidates, n=1, cutoff=NEAR)


class Names:
    """Looks names up, and keeps what it could not find (``problems``) and what it found (``used``)."""

    def __init__(self):
        self.api, self.classes = tensorrt_api.load(), {}
        self.problems, self.used, self.places, self.file = {}, set(), set(), ""

    def use(self, name, node, what="name"):
        """Note a name of TensorRT's that the code uses, and where: what is planted there must be found."""
        self.used.add(name)
        self.places.add((what, self.file, node.end_lineno, node.end_col_offset))

    def problem(self, node, text):
        self.problems[((self.file, node.lineno), text)] = True
        return Type("lost", "an error was reported")

    # --- annotations and signatures

    def annotation(self, node):
        """The type that an annotation tells; ``UNKNOWN`` without one."""
        if node is None:
            return UNKNOWN
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return self.annotation(ast.copy_location(ast.parse(node.value, mode="eval").body, node))
        if isinstance(node, ast.BinOp):
            return self.better(self.annotation(node.left), self.annotation(node.right))
        if isinstance(node, ast.Attribute):
            return self.named(node)
        if isinstance(node, ast.Name):
            own = self.classes.get(node.id)
            if node.id == "ModuleType":
                return MODULE
            return Type("own", node.id, of=own) if own else Type("plain", node.id)
        if isinstance(node, ast.Subscript):
            return self.subscripted(node)
        return PLAIN

    def named(self, node):
        """``trt.X`` in an annotation."""
        head, _, rest = ast.unparse(node).partition(".")
        if head not in MODULE_NAMES:
            return PLAIN
        if rest not in self.api.classes:
            return self.problem(node, f"TensorRT 11.0 has no class {rest}{similar(rest, self.api.classes)}")
        self.used.add(rest)
        return instance(rest)

    def subscripted(self, node):
        outer = ast.unparse(node.value).split(".")[-1]
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        located = [ast.copy_location(part, node) for part in inner]
        if outer == "Callable":
            return Type("returns", items=(self.annotation(located[-1]),))
        items = [self.annotation(part) for part in located]
        if outer in WRAPPERS:
            return items[0]
        if outer == "type" and items[0].kind == "instance":
            return Type("class", items[0].name)
        if outer == "tuple" and not (len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is ...):
            return Type("tuple", items=tuple(items))
        if outer in (*ELEMENTS, "tuple"):
            return listed(items[0])
        return Type("map", items=(items[-1],)) if outer in MAPS else PLAIN

    def result(self, text, call):
        """The type that a signature of the API names."""
        if text in self.api.classes:
            return instance(text)
        match = re.fullmatch(r"(list|tuple)\[(.+)\]", text)
        if match:
            items = tuple(self.result(part, call) for part in tensorrt_api.split(match[2]))
            return Type(match[1], items=items)
        if text in ("None", "str", "int", "bool", "float", "bytes", "memoryview", "list", "tuple"):
            return PLAIN
        return Type("lost", f"{call}, which the API file says is {text!r}")

    def better(self, one, other):
        """Of two types that an expression may have: the one that says more."""
        return one if one.holds() or one.kind in ("own", "own class", "module", "class", "list", "map", "tuple") else other

    # --- attributes

    def attribute(self, base, name, node):
        """The type of ``base.name``; reports what does not exist."""
        finder = getattr(self, "attribute_of_" + base.kind.replace(" ", "_"), None)
        return finder(base, name, node) if finder else self.attribute_of_unknown(base, name, node)

    def attribute_of_module(self, _base, name, node):
        self.use(name, node)
        if name in self.api.classes:
            return Type("class", name)
        if name in self.api.functions:
            return Type("function", name, of=self.api.functions[name])
        if name in self.api.constants:
            return instance(tensorrt_api.CONSTANT_TYPE)
        if name in tensorrt_api.MODULE_FACTS:
            return PLAIN
        return self.problem(node, f"TensorRT 11.0 has no {name}{similar(name, [*self.api.classes, *self.api.functions])}")

    def attribute_of_class(self, base, name, node):
        kind = self.api.classes[base.name]
        self.use(f"{base.name}.{name}", node)
        if kind.enum and name == "__members__":
            return Type("map", items=(instance(base.name),))
        if kind.enum and name in kind.enum:
            return instance(base.name)
        if name in tensorrt_api.NESTED and "ILogger" in self.api.lineage(base.name):
            return Type("class", tensorrt_api.SEVERITY)
        if name in tensorrt_api.OBJECT_MEMBERS:
            return PLAIN
        if not kind.enum and name in kind.methods:
            return Type("unbound", f"{base.name}.{name}")
        if not kind.enum and name in kind.properties and name.isupper():
            return self.result(kind.properties[name][0], f"{base.name}.{name}")
        return self.missing(base, name, node)

    def attribute_of_instance(self, base, name, node):
        kind = self.api.classes[base.name]
        self.use(f"{base.name}.{name}", node)
        if kind.enum:
            return (
                PLAIN if name in (*tensorrt_api.ENUM_MEMBERS, *tensorrt_api.OBJECT_MEMBERS) else self.missing(base, name, node)
            )
        if name == "__class__":
            return Type("class", base.name)
        if name in kind.properties:
            told = kind.properties[name][0]
            return self.result(told, f"{base.name}.{name}") if told else Type("lost", f"{base.name}.{name}, of unknown type")
        if name in kind.methods:
            return Type("method", f"{base.name}.{name}", of=kind.methods[name])
        return PLAIN if name in tensorrt_api.OBJECT_MEMBERS else self.missing(base, name, node)

    def missing(self, base, name, node):
        kind = self.api.classes[base.name]
        names = kind.enum or [*kind.methods, *kind.properties]
        return self.problem(node, f"TensorRT 11.0 has no {base.name}.{name}{similar(name, names)}")

    def attribute_of_lost(self, base, name, node):
        return self.problem(node, f"cannot tell what .{name} is an attribute of: annotate what comes from {base.name}")

    def attribute_of_method(self, base, name, node):
        return self.problem(node, f"{base.name} is a method; it has no attribute {name}: call it")

    attribute_of_function = attribute_of_unbound = attribute_of_method

    def attribute_of_own(self, base, name, node):
        """On an object of a class of these files."""
        for own in self.ancestry(base.of):
            if name in own.fields:
                return own.fields[name]
            if name in own.methods:
                method = own.methods[name]
                if method.decorated("property", "cached_property"):
                    return self.annotation(method.node.returns)
                return Type("own function", name, of=method)
        vendor = self.vendor_base(base.of)
        return self.attribute(instance(vendor), name, node) if vendor else self.attribute_of_unknown(base, name, node)

    attribute_of_own_class = attribute_of_own

    def attribute_of_super(self, base, name, node):
        vendor = self.vendor_base(base.of)
        return self.attribute(instance(vendor), name, node) if vendor else UNKNOWN

    def attribute_of_list(self, base, name, _node):
        return Type("returns", items=base.items) if name in ("pop", "popleft") else PLAIN

    attribute_of_tuple = attribute_of_plain_constant = attribute_of_list

    def attribute_of_map(self, base, name, _node):
        (item,) = base.items
        results = {"values": listed(item), "items": listed(Type("tuple", items=(PLAIN, item)))}
        return Type("returns", items=(results.get(name, item if name in ("get", "pop", "setdefault") else PLAIN),))

    def attribute_of_foreign(self, _base, _name, _node):
        return FOREIGN

    def attribute_of_unknown(self, _base, name, node):
        near = nearest(name)
        if near:
            whose = sorted(k.name for k in self.api.classes.values() if not k.enum and k.has(near[0]))
            self.problem(
                node,
                f"cannot tell what {ast.unparse(node.value)} is, but .{name} looks like {near[0]} of {', '.join(whose[:4])}: "
                f'annotate it with "trt.{whose[0]}" or the like',
            )
        return UNKNOWN

    def ancestry(self, own):
        found = [own]
        for base in own.bases:
            if base.kind == "own class":
                found += self.ancestry(base.of)
        return found

    def vendor_base(self, own):
        """The TensorRT class that a class of these files descends from, or ``None``."""
        return next((base.name for kind in self.ancestry(own) for base in kind.bases if base.kind == "class"), None)

    def declare(self, file, node):
        """Fields and methods of a class, from what is written at its top."""
        self.file, own = file, self.classes[node.name]
        for item in node.body:
            if isinstance(item, ast.FunctionDef):
                own.methods[item.name] = OwnFunction(item, own)
            elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                own.fields[item.target.id] = self.annotation(item.annotation)
                own.declared.add(item.target.id)
                own.order.append(item.target.id)
