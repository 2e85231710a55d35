"""Checks every TensorRT name in a source file against the API of TensorRT 11.0, which this machine cannot load.

It reads the file's syntax tree and works out which expressions are TensorRT objects. Conventions for the code that it reads
(``engines/tensorrt*.py`` and every file that imports ``tensorrt``):

1. **The module** is what is annotated ``ModuleType``; a name or attribute called ``trt``, ``_trt`` or ``tensorrt``, which mean
   nothing else in those files; and one called ``library`` or ``_library`` unless it is annotated with something else.
   ``import tensorrt as trt`` under ``TYPE_CHECKING`` is what mypy reads; a function that is given the module best calls it
   ``library``, since a parameter called ``trt`` would hide the alias from annotations in its body.
2. **Objects** are inferred from constructors, methods and properties: ``builder = library.Builder(logger)``,
   ``builder.create_network(0)``, ``parser.get_error(i).desc()``, ``network.get_layer(i).type``. Loops, comprehensions,
   ``with … as``, unpacking, ``a if c else b``, ``a or b``, ``:=``, closures, and returns and attributes of classes of the files
   are followed.
3. **What cannot be inferred is annotated** with ``"trt.IExecutionContext"`` in quotes: every parameter, return and dataclass
   field that holds a TensorRT object, also in ``X | None``, ``list[…]``, ``tuple[…]``, ``dict[…, …]``, ``Mapping``,
   ``Sequence``, ``Iterable``, ``Iterator``, ``type[…]``; ``cast("trt.X", value)`` works, too. A function that takes such an
   object says so: passing one to a parameter of a function of these files which is annotated otherwise is an error, unless
   with ``object``. What is annotated with another type (``Any``, ``str``) holds no TensorRT object.
4. **Attributes of TensorRT objects** must exist. Calls must fit the number of positional arguments and the keywords of one
   overload, without ``*`` or ``**``; TensorRT objects that are passed must be of the parameter's class. Properties that are set
   must be writable. Enum members are ``library.BuilderFlag.REFIT``, or ``library.BuilderFlag.__members__[text]`` for text.
   ``getattr`` and ``hasattr`` take literals. Ask for ``library.__version__``; what else is outside the API file stands with a
   reason in ``tensorrt_api.MODULE_FACTS``.
5. **Subclasses** (``class Progress(library.IProgressMonitor)``) override methods that exist, with as many parameters;
   helpers of their own begin with ``_``. An ``__init__`` calls ``super().__init__()`` first, or TensorRT crashes.
   ``layer.__class__ = library.IAttentionInputLayer`` makes ``layer`` one.
6. **Nothing slips through**: an attribute on an object that is not known to be TensorRT's but whose name TensorRT has and
   nobody else (``device_memory_size_v2``, ``execute_async_v3``), or nearly has (``execute_async_v2``), is an error that asks
   for an annotation; so is an attribute on what a TensorRT call returns without saying what it is.
"""

import ast
import builtins
from dataclasses import dataclass, field

import tensorrt_api
from tensorrt_names import (
    FOREIGN,
    MODULE,
    MODULE_NAMES,
    PLAIN,
    UNKNOWN,
    USUAL_NAMES,
    Names,
    OwnClass,
    OwnFunction,
    Type,
    instance,
    listed,
)

SAME_ELEMENTS = ("list", "tuple", "sorted", "reversed", "iter", "set", "frozenset")
GIVEN_AS = {"str": ("str",), "bool": ("bool",), "SupportsInt": ("int", "bool"), "SupportsFloat": ("float", "int")}
KNOWN = ("str", "bool", "int", "float", "bytes", "NoneType", "Path")  # plain types that are never something else
FROM_SEQUENCE = ("Dims", "Dims2", "Dims3", "Dims4", "Permutation")  # classes that TensorRT makes itself of tuples


@dataclass(frozen=True)
class Problem:
    """Something that TensorRT 11.0 does not have, or that cannot be told."""

    file: str
    line: int
    text: str

    def __str__(self):
        return f"{self.file}:{self.line}: {self.text}"


@dataclass
class File:
    """A parsed file, and what it defines at its top."""

    name: str
    tree: ast.Module
    defined: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The problems, TensorRT's names in the code, and where: ``("name" or "call", file, line, column where it ends)``."""

    problems: tuple[Problem, ...]
    used: frozenset[str]
    places: frozenset[tuple[str, str, int, int]]


def check(sources):
    """Check files, given as ``{name: source text}``."""
    files = [File(name, ast.parse(text)) for name, text in sources.items()]
    checker = Checker(files)
    for _ in range(3):  # attributes are inferred from assignments that may come later
        checker.names.problems, checker.names.used, checker.names.places = {}, set(), set()
        for file in files:
            checker.check_file(file)
    problems = tuple(Problem(*place, text) for place, text in sorted(checker.names.problems))
    return Report(problems, frozenset(checker.names.used), frozenset(checker.names.places))


def known(found):
    """Is it known what this is?"""
    return found.kind not in ("unknown", "foreign") and found.name != "Any"


def end_of_name(function):
    """The column where the name of ``def name(…)`` ends."""
    return function.col_offset + len("def ") + len(function.name)


class Checker:
    """Walks statements in order with an environment of names. ``do_X`` handles statements, ``eval_X`` expressions."""

    def __init__(self, files):
        self.names, self.files = Names(), files
        self.api, self.problem = self.names.api, self.names.problem
        self.env, self.owner, self.returns, self.postponed = {}, None, UNKNOWN, []
        for file in files:
            for node in ast.walk(file.tree):
                if isinstance(node, ast.ClassDef):
                    self.names.classes[node.name] = OwnClass(node.name)
        for file in files:
            for node in ast.walk(file.tree):
                if isinstance(node, ast.ClassDef):
                    self.names.declare(file.name, node)
            for node in file.tree.body:
                if isinstance(node, ast.FunctionDef):
                    file.defined[node.name] = Type("own function", node.name, of=OwnFunction(node))
                elif isinstance(node, ast.ClassDef):
                    file.defined[node.name] = Type("own class", node.name, of=self.names.classes[node.name])

    def check_file(self, file):
        self.names.file, self.env, self.postponed = file.name, dict(file.defined), []
        self.block(file.tree.body)
        self.finish()

    # --- statements

    def block(self, statements):
        for statement in statements:
            self.do(statement)

    def do(self, node):
        handler = getattr(self, "do_" + type(node).__name__, None)
        if handler:
            handler(node)
            return
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.eval(child)
            else:
                self.do(child)  # statements, and parts of them such as match cases and handlers

    def branches(self, *bodies):
        """Alternatives: a name is afterwards what says most in any of them."""
        before, after = self.env, dict(self.env)
        for body in bodies:
            self.env = dict(before)
            self.block(body)
            for name, found in self.env.items():
                after[name] = self.names.better(found, after.get(name, found))
        before.update(after)
        self.env = before

    def do_If(self, node):
        self.eval(node.test)
        self.branches(node.body, node.orelse)

    def do_For(self, node):
        self.bind(node.target, self.iterate(self.eval(node.iter), node.iter))
        self.branches([*node.body, *node.orelse])

    def do_While(self, node):
        self.eval(node.test)
        self.branches([*node.body, *node.orelse])

    def do_With(self, node):
        for item in node.items:
            entered = self.enter(self.eval(item.context_expr), item.context_expr)
            if item.optional_vars is not None:
                self.bind(item.optional_vars, entered)
        self.block(node.body)

    def enter(self, value, node):
        if value.kind == "instance":
            return self.problem(node, f"{value.name} is no context manager in the API file")
        if value.kind == "own":
            found = self.names.attribute(value, "__enter__", node)
            returned = self.call_own_function(found, node, [], {}) if found.kind == "own function" else UNKNOWN
            return value if returned.name == "Self" else returned
        return value.items[0] if value.kind == "list" else UNKNOWN  # of a function with @contextmanager

    def do_Import(self, node):
        for alias in node.names:
            name = alias.asname or alias.name.split(".")[0]
            if alias.name.split(".")[0] == "tensorrt" and name not in (*MODULE_NAMES, *USUAL_NAMES):
                self.problem(node, f"the module tensorrt is called {name} here: call it trt")
            self.env[name] = FOREIGN

    def do_ImportFrom(self, node):
        if node.module == "tensorrt":
            self.problem(node, "names are imported from tensorrt: import the module")
        stem = (node.module or "").split(".")[-1]
        (file,) = [f for f in self.files if f.name.split("/")[-1] == f"{stem}.py"] or [None]
        for alias in node.names:
            self.env[alias.asname or alias.name] = file.defined.get(alias.name, UNKNOWN) if file else FOREIGN

    def do_Assign(self, node):
        value = self.eval(node.value)
        for target in node.targets:
            self.bind(target, value)

    def do_AnnAssign(self, node):
        told = self.names.annotation(node.annotation)
        value = self.eval(node.value) if node.value else UNKNOWN
        if value.holds() and not told.holds() and not told.kind.startswith("own"):
            self.problem(node, f"a TensorRT object ({value.name}) is annotated {ast.unparse(node.annotation)}")
        if isinstance(node.target, ast.Name):
            self.env[node.target.id], self.env[node.target.id + ":"] = told, told
        elif isinstance(node.target, ast.Attribute):
            base = self.eval(node.target.value)
            if base.kind == "own":
                base.of.fields[node.target.attr] = told
                base.of.declared.add(node.target.attr)

    def do_AugAssign(self, node):
        self.eval(node.value)
        self.eval(node.target)
        if isinstance(node.target, ast.Attribute):
            self.bind(node.target, PLAIN)

    def do_Return(self, node):
        if node.value is None:
            return
        value = self.eval(node.value)
        told = self.returns
        if value.holds() and not told.holds() and told.name != "object":
            self.problem(node, f"a TensorRT object ({value.name}) is returned, but the function is not annotated with it")

    def do_FunctionDef(self, node):
        self.env[node.name] = Type("own function", node.name, of=OwnFunction(node))
        self.postpone(node, None)

    def postpone(self, node, owner):
        """Check a body later: it sees names that are bound after it."""
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.decorator_list):
            self.eval(default)
        self.postponed.append((node, self.env, owner))

    def finish(self):
        """Check the bodies that were put off."""
        while self.postponed:
            node, env, owner = self.postponed.pop(0)
            outer = self.postponed, self.owner, self.returns
            self.postponed, self.env, self.owner = [], dict(env), owner or self.owner
            self.returns = self.names.annotation(node.returns)
            self.parameters(node, owner)
            self.block(node.body)
            self.finish()
            self.postponed, self.owner, self.returns = outer

    def parameters(self, node, owner):
        """Bind them: annotated, or known from the TensorRT method that is overridden."""
        vendor = self.names.vendor_base(owner) if owner else None
        overridden = self.api.classes[vendor].methods.get(node.name, ()) if vendor else ()
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        for place, argument in enumerate(every):
            told = self.names.annotation(argument.annotation)
            if argument.annotation is None and overridden and 0 < place <= len(overridden[0].parameters):
                told = self.names.result(overridden[0].parameters[place - 1].type, argument.arg)
            self.env[argument.arg] = told
            self.env.pop(argument.arg + ":", None)
        for extra in filter(None, (arguments.vararg, arguments.kwarg)):
            self.env[extra.arg] = listed(self.names.annotation(extra.annotation))
        own = OwnFunction(node, owner)
        if own.bound_to_object() and every:
            self.env[every[0].arg] = Type("own class" if own.decorated("classmethod") else "own", owner.name, of=owner)

    def do_ClassDef(self, node):
        own = self.names.classes[node.name]
        own.bases = [self.eval(base) for base in node.bases]
        self.env[node.name] = Type("own class", node.name, of=own)
        vendor = self.names.vendor_base(own)
        outer, self.env = self.env, dict(self.env)
        for item in node.body:
            if isinstance(item, ast.FunctionDef):
                self.postpone(item, own)
                if vendor:
                    self.check_override(item, vendor)
            else:
                self.do(item)
        self.env = outer
        if vendor and any(ast.unparse(d).split("(")[0].endswith("dataclass") for d in node.decorator_list):
            self.problem(node, f"{node.name} is a dataclass, whose __init__ does not call that of {vendor}: TensorRT crashes")

    def check_override(self, node, vendor):
        """A method of a subclass of a TensorRT class."""
        if node.name == "__init__":
            calls = [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]
            if not any(call.endswith(".__init__") for call in calls):
                self.problem(node, f"__init__ does not call super().__init__(): TensorRT crashes on such a {vendor}")
            return
        if node.name.startswith("_"):
            return
        overloads = self.api.classes[vendor].methods.get(node.name)
        if overloads is None:
            self.problem(node, f"TensorRT 11.0 has no method {vendor}.{node.name} to override; helpers begin with _")
            return
        self.names.use(f"{vendor}.{node.name}", ast.Name(node.name, end_lineno=node.lineno, end_col_offset=end_of_name(node)))
        count = len(node.args.posonlyargs) + len(node.args.args) - 1
        wanted = len(overloads[0].parameters)
        required = count - len(node.args.defaults)
        if not (required <= wanted <= count or (node.args.vararg and required <= wanted)):
            self.problem(node, f"{vendor}.{node.name} has {wanted} parameters after self, the override has {count}")

    # --- targets

    def bind(self, target, value):
        if isinstance(target, ast.Name):
            told = self.env.get(target.id + ":")
            if told is not None and value.holds() and not told.holds():
                self.problem(target, f"a TensorRT object ({value.name}) is put into {target.id}, which is annotated otherwise")
            before = self.env.get(target.id, UNKNOWN)
            keeps = value.name == "NoneType" and before.holds()
            self.env[target.id] = told or (before if keeps else value)
        elif isinstance(target, ast.Attribute):
            self.write(target, value)
        elif isinstance(target, ast.Subscript):
            self.eval(target.slice)
            self.put_into(target.value, value, Type("map", items=(value,)))
        elif isinstance(target, ast.Starred):
            self.bind(target.value, listed(value))
        else:
            fits = value.kind == "tuple" and len(value.items) == len(target.elts)
            parts = value.items if fits else [self.iterate(value, target)] * len(target.elts)
            for element, part in zip(target.elts, parts, strict=True):
                self.bind(element, part)

    def put_into(self, container, value, becomes):
        """``container[…] = value``, or ``container.append(value)``."""
        base = self.eval(container)
        if base.kind in ("instance", "module", "class"):
            self.problem(container, f"{base.name or 'the module'} cannot be filled by index")
        elif value.holds() and not base.holds():
            if isinstance(container, ast.Name) and container.id + ":" not in self.env:
                self.env[container.id] = becomes
            else:
                self.problem(container, f'{ast.unparse(container)} gets a TensorRT object: annotate it with "trt.{value.name}"')

    def write(self, target, value):
        """``base.attr = value``."""
        base, name = self.eval(target.value), target.attr
        if base.kind == "own" and self.names.vendor_base(base.of) is None:
            own = base.of
            if name not in own.declared:
                own.fields[name] = self.names.better(value, own.fields.get(name, value))
            elif value.holds() and not own.fields[name].holds():
                self.problem(target, f"a TensorRT object ({value.name}) is put into .{name}, which is annotated otherwise")
        elif name == "__class__" and value.kind == "class" and isinstance(target.value, ast.Name):
            self.env[target.value.id] = instance(value.name)
        elif base.kind in ("module", "class"):
            self.problem(target, f"{ast.unparse(target)} is set: TensorRT's own names stay as they are")
        elif base.kind == "instance":
            self.write_property(target, base, value)
        elif base.kind == "own":
            base.of.fields[name] = self.names.better(value, base.of.fields.get(name, value))
        else:
            self.names.attribute(base, name, target)

    def write_property(self, target, base, value):
        properties = self.api.classes[base.name].properties or {}
        name = target.attr
        if name not in properties:
            self.problem(target, f"{base.name}.{name} is set, but TensorRT 11.0 has no such property")
            return
        self.names.use(f"{base.name}.{name}", target)
        kind, writable = properties[name]
        if not writable:
            self.problem(target, f"{base.name}.{name} cannot be set")
        wrong = self.misfit(tensorrt_api.Parameter(name, kind, "None"), value) if kind else None
        if wrong:
            self.problem(target, f"{base.name}.{name} is set: {wrong}")

    def iterate(self, value, node):
        """What the elements are."""
        if value.kind == "list":
            return value.items[0]
        if value.kind == "tuple":
            return self.best(value.items)
        if value.kind in ("class", "module"):
            return self.problem(node, f"{value.name or 'the module'} cannot be iterated; enums of TensorRT have __members__")
        if value.kind == "instance":
            overloads = (self.api.classes[value.name].methods or {}).get("__getitem__")
            return (
                self.names.result(overloads[0].returns, "")
                if overloads
                else self.problem(node, f"{value.name} has no elements")
            )
        return PLAIN if value.kind == "map" else UNKNOWN

    def best(self, types):
        found = UNKNOWN
        for one in types:
            found = self.names.better(one, found)
        return found

    # --- expressions

    def eval(self, node):
        """The type of an expression."""
        handler = getattr(self, "eval_" + type(node).__name__, None)
        if handler:
            return handler(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.eval(child)
        return PLAIN

    def eval_Name(self, node):
        if node.id in MODULE_NAMES or (node.id in USUAL_NAMES and not known(self.env.get(node.id, UNKNOWN))):
            return MODULE
        if node.id in self.env:
            return self.env[node.id]
        return Type("builtin", node.id) if hasattr(builtins, node.id) else UNKNOWN

    def eval_Constant(self, node):
        return Type("plain", type(node.value).__name__)

    def eval_Attribute(self, node):
        found = self.member(node)
        if found.kind in ("method", "unbound"):
            self.problem(node, f"{found.name} is a method: call it")
        return found

    def member(self, node):
        base = self.eval(node.value)
        usual = node.attr in USUAL_NAMES and not (
            base.kind.startswith("own") and known(self.names.attribute(base, node.attr, node))
        )
        return MODULE if node.attr in MODULE_NAMES or usual else self.names.attribute(base, node.attr, node)

    def eval_Subscript(self, node):
        base = self.eval(node.value)
        self.eval(node.slice)
        if base.kind == "tuple" and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
            return base.items[node.slice.value] if -len(base.items) <= node.slice.value < len(base.items) else UNKNOWN
        if base.kind == "map":
            return self.member_of_enum(node, base)
        if base.kind in ("list", "tuple") and isinstance(node.slice, ast.Slice):
            return listed(self.iterate(base, node))
        if base.kind in ("list", "tuple", "instance", "class", "module"):
            return self.iterate(base, node)
        return base if base.kind in ("lost", "foreign") else UNKNOWN

    def member_of_enum(self, node, base):
        """``trt.BuilderFlag.__members__["REFIT"]``, or any other mapping."""
        (item,) = base.items
        written = isinstance(node.value, ast.Attribute) and node.value.attr == "__members__"
        if written and isinstance(node.slice, ast.Constant):
            return self.names.attribute(Type("class", item.name), node.slice.value, node)
        return item

    def eval_IfExp(self, node):
        self.eval(node.test)
        return self.best([self.eval(node.orelse), self.eval(node.body)])

    def eval_BoolOp(self, node):
        return self.best([self.eval(value) for value in node.values])

    def eval_BinOp(self, node):
        left, right = self.eval(node.left), self.eval(node.right)
        return self.best([left, right]) if isinstance(node.op, ast.Add) and "list" in (left.kind, right.kind) else PLAIN

    def eval_NamedExpr(self, node):
        value = self.eval(node.value)
        self.bind(node.target, value)
        return value

    def eval_Starred(self, node):
        return self.iterate(self.eval(node.value), node)

    def eval_Tuple(self, node):
        items = tuple(self.eval(element) for element in node.elts)
        return listed(self.best(items)) if any(isinstance(e, ast.Starred) for e in node.elts) else Type("tuple", items=items)

    def eval_List(self, node):
        return listed(self.best([self.eval(element) for element in node.elts]))

    eval_Set = eval_List

    def eval_Dict(self, node):
        for key in filter(None, node.keys):
            self.eval(key)
        values = [self.eval(value) for value in node.values]
        unpacked = [
            value.items[0] if value.kind == "map" and key is None else value
            for key, value in zip(node.keys, values, strict=True)
        ]
        return Type("map", items=(self.best(unpacked),))

    def eval_ListComp(self, node):
        return listed(self.comprehend(node, node.elt))

    eval_SetComp = eval_GeneratorExp = eval_ListComp

    def eval_DictComp(self, node):
        return Type("map", items=(self.comprehend(node, node.key, node.value),))

    def comprehend(self, node, *parts):
        outer, self.env = self.env, dict(self.env)
        for generator in node.generators:
            self.bind(generator.target, self.iterate(self.eval(generator.iter), generator.iter))
            for test in generator.ifs:
                self.eval(test)
        found = [self.eval(part) for part in parts][-1]
        self.env = outer
        return found

    def eval_Lambda(self, node):
        outer, self.env = self.env, {**self.env, **{a.arg: UNKNOWN for a in (*node.args.args, *node.args.kwonlyargs)}}
        body = self.eval(node.body)
        self.env = outer
        return Type("returns", items=(body,))

    # --- calls

    def eval_Call(self, node):
        function = self.member(node.func) if isinstance(node.func, ast.Attribute) else self.eval(node.func)
        positional = [self.eval(argument) for argument in node.args]
        keywords = {keyword.arg: self.eval(keyword.value) for keyword in node.keywords}
        if isinstance(node.func, ast.Attribute):
            base = self.eval(node.func.value)
            kind = self.api.classes.get(base.name) if base.kind == "instance" else None
            if kind and node.func.attr in (kind.properties or {}):
                return self.problem(node, f"{base.name}.{node.func.attr} is a property: it cannot be called")
            if node.func.attr in ("append", "add", "appendleft") and len(positional) == 1:
                self.put_into(node.func.value, positional[0], listed(positional[0]))
        handler = getattr(self, "call_" + function.kind.replace(" ", "_"), None)
        return handler(function, node, positional, keywords) if handler else UNKNOWN

    def call_instance(self, function, node, _positional, _keywords):
        return self.problem(node, f"{ast.unparse(node.func)} is a {function.name}: it cannot be called")

    call_module = call_instance

    def call_class(self, function, node, positional, keywords):
        kind = self.api.classes[function.name]
        if kind.enum:
            return self.problem(node, f"{function.name}(…): name a member, their values change between versions")
        if not kind.methods["__init__"]:
            return self.problem(node, f"{function.name} cannot be made by hand")
        self.fit(function.name, kind.methods["__init__"], node, positional, keywords)
        return instance(function.name)

    def call_method(self, function, node, positional, keywords):
        overload = self.fit(function.name, function.of, node, positional, keywords)
        return self.names.result(overload.returns, function.name) if overload else Type("lost", function.name)

    call_function = call_method

    def call_unbound(self, function, node, positional, keywords):
        """``trt.ILogger.__init__(self)``."""
        owner, name = function.name.rsplit(".", 1)
        self.fit(function.name, self.api.classes[owner].methods[name], node, positional[1:], keywords)
        return PLAIN

    def call_returns(self, function, _node, _positional, _keywords):
        return function.items[0]

    def fit(self, name, overloads, node, positional, keywords):
        """The overload that a call fits."""
        self.names.use(name, node, "call")
        if any(isinstance(argument, ast.Starred) for argument in node.args) or None in keywords:
            self.problem(node, f"{name} is called with * or **: write the arguments out")
            return overloads[0] if overloads else None
        reasons = []
        for overload in overloads:
            reason = overload.misfit(len(positional), keywords)
            wrong = [self.misfit(p, t) for p, t in overload.bound(positional, keywords)] if reason is None else []
            reason = reason or next(filter(None, wrong), None)
            if reason is None:
                return overload
            reasons.append(reason)
        if overloads:
            self.problem(node, f"{name} {'; or '.join(dict.fromkeys(reasons))}")
        return overloads[0] if overloads else None

    def misfit(self, parameter, value):
        """Why a value cannot be given for a parameter, as far as both are known."""
        vendor = self.names.vendor_base(value.of) if value.kind == "own" else value.name if value.kind == "instance" else None
        wanted = parameter.type
        text = f"{parameter.name} must be {wanted}, not "
        if value.kind == "plain" and value.name in KNOWN:
            if value.name == "NoneType":
                return None if parameter.default == "None" else text + "None"
            fits = GIVEN_AS.get(wanted, KNOWN if wanted not in self.api.classes else ())
            return None if value.name in fits else text + value.name
        if value.kind == "own" and vendor is None and wanted in self.api.classes:
            return text + value.name
        if vendor is None:
            sequence = value.kind in ("list", "map") and wanted in self.api.classes and wanted not in FROM_SEQUENCE
            return text + "a sequence" if sequence else None
        enum = bool(self.api.classes[vendor].enum)
        if wanted in self.api.classes or wanted in GIVEN_AS:
            fits = wanted in self.api.lineage(vendor) or (wanted == "SupportsInt" and enum)
            return None if fits else text + vendor
        return None

    def call_own_class(self, function, node, positional, keywords):
        own = function.of
        made = next((k.methods["__init__"] for k in self.names.ancestry(own) if "__init__" in k.methods), None)
        if made is not None:
            self.call_own_function(Type("own function", "__init__", of=made), node, positional, keywords)
        else:
            given = {**dict(zip(own.order, positional, strict=False)), **keywords}
            for name, value in given.items():
                if name in own.fields and value.holds() and not own.fields[name].holds():
                    self.problem(node, f'{own.name}.{name} gets a TensorRT object: annotate it with "trt.{value.name}"')
        return Type("own", own.name, of=own)

    def call_own_function(self, function, node, positional, keywords):
        own = function.of
        parameters = own.parameters()[1:] if own.bound_to_object() else own.parameters()
        by_name = {p.arg: p for p in (*parameters, *own.node.args.kwonlyargs)}
        pairs = [*zip(parameters, positional, strict=False), *((by_name[k], v) for k, v in keywords.items() if k in by_name)]
        for parameter, value in pairs:
            told = self.names.annotation(parameter.annotation)
            if value.kind == "module" and parameter.arg not in (*MODULE_NAMES, *USUAL_NAMES) and told.kind != "module":
                self.problem(node, f"{own.node.name} gets the module as {parameter.arg}: call it library")
            if value.holds() and not told.holds() and told.name != "object" and not self.is_vendor(told):
                self.problem(node, f'{own.node.name} gets a TensorRT object: annotate {parameter.arg} with "trt.{value.name}"')
        told = self.names.annotation(own.node.returns)
        return Type("own", own.owner.name, of=own.owner) if told.name == "Self" and own.owner else told

    def is_vendor(self, told):
        return told.kind == "own" and self.names.vendor_base(told.of) is not None

    def call_builtin(self, function, node, positional, _keywords):
        name, first = function.name, positional[0] if positional else UNKNOWN
        if name in ("getattr", "hasattr", "setattr", "delattr"):
            return self.by_name(name, node, first)
        if name == "super":
            return Type("super", self.owner.name, of=self.owner) if self.owner else UNKNOWN
        if name == "len" and first.kind == "instance" and "__len__" not in (self.api.classes[first.name].methods or {}):
            return self.problem(node, f"{first.name} has no length")
        if name in SAME_ELEMENTS and positional:
            return listed(self.iterate(first, node))
        if name in ("next", "min", "max") and positional:
            return self.iterate(first, node)
        if name == "enumerate":
            return listed(Type("tuple", items=(PLAIN, self.iterate(first, node))))
        if name == "zip":
            return listed(Type("tuple", items=tuple(self.iterate(part, node) for part in positional)))
        if name == "type" and first.kind == "instance":
            return Type("class", first.name)
        return PLAIN

    def by_name(self, name, node, base):
        """``getattr(base, "x")``."""
        if base.kind not in ("module", "class", "instance", "lost"):
            return UNKNOWN
        if not isinstance(node.args[1], ast.Constant):
            return self.problem(node, f"{name} of a TensorRT object needs a literal, not {ast.unparse(node.args[1])}")
        found = self.names.attribute(base, node.args[1].value, node)
        return PLAIN if name == "hasattr" else found

    def call_foreign(self, _function, node, _positional, _keywords):
        """``cast("trt.X", value)``; other foreign calls say nothing."""
        if ast.unparse(node.func).split(".")[-1] == "cast":
            return self.names.annotation(node.args[0])
        return UNKNOWN
