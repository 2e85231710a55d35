import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cachec
from cachec.runtime.errors import MissingExtraError

ROOT = Path(__file__).resolve().parent.parent
NOT_PACKAGED = ("tests", "reference", "bench", "examples")
LAYERS = ("cli", "compiler", "serving", "pictures", "engines", "passes", "runtime")
MAY_IMPORT = {
    "runtime": {"runtime"},
    "passes": {"passes", "runtime"},
    "engines": {"engines", "runtime"},
    "pictures": {"pictures", "engines", "runtime"},
    "compiler": {"compiler", "pictures", "passes", "engines", "runtime"},
    "serving": {"serving", "pictures", "engines", "runtime"},
    "cli": {"", "compiler", "serving", "pictures", "engines", "runtime"},
    "__main__": {"cli"},
    "": {"compiler", "pictures", "engines", "runtime"},
}
# rooms of the compiler, low to high; those of one line know nothing of each other. Files beside the rooms are rooms, too.
ROOMS = (
    ("tables", "fingerprint", "stages"),
    ("models",),
    ("graphs", "options", "stand_in", "cache_configs"),
    ("calibration", "drop_in"),
    ("handed",),
    ("methods", "distillation"),
    ("planning",),
    ("evaluation",),
    ("request",),
    ("frontend", "manifest"),
    ("measuring", "self_contained"),
    ("parts",),
    ("late_targets",),
    ("pipeline", "accelerate"),
    ("as_transformer",),
    ("commands",),
)
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
HEAVY = ("torch", "diffusers", "onnx", "onnxruntime", "transformers")

IN_THE_TREE = (ROOT / "pyproject.toml").is_file()

in_the_tree = pytest.mark.skipif(not IN_THE_TREE, reason="the source tree is not beside the tests")


def source_files(root, *, without=NOT_PACKAGED):
    hidden = ("build", "dist")
    files = [path.relative_to(root) for path in root.rglob("*.py") if "site-packages" not in path.parts]
    return sorted(f for f in files if f.parts[0] not in (*without, *hidden) and not f.parts[0].startswith("."))


def layer_of(path):
    if len(path.parts) > 1:
        return path.parts[0]
    return "" if path.name == "__init__.py" else path.stem


def imported_modules(nodes):
    """Dotted names, with what is imported from each: ``from a import b`` gives ``a`` and ``a.b``."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module} in line {node.lineno}"
            yield from [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]


def imported_layers(names):
    for name in names:
        parts = name.split(".")
        if parts[0] == "cachec" and len(parts) > 1:
            yield parts[1] if parts[1] in LAYERS else ""


def module_names():
    root = Path(cachec.__file__).parent
    for path in source_files(root):
        parts = ["cachec", *path.with_suffix("").parts]
        if parts[-1] != "__main__":  # importing it runs the command line
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@in_the_tree
@pytest.mark.parametrize("path", source_files(ROOT) if IN_THE_TREE else [], ids=str)
def test_imports_follow_the_layers(path):
    names = list(imported_modules(ast.walk(ast.parse((ROOT / path).read_text()))))
    bare = [name for name in names if name.split(".")[0] in LAYERS]
    assert not bare, f"{path} imports {bare} without the cachec. prefix"
    strange = set(imported_layers(names)) - MAY_IMPORT[layer_of(path)]
    assert not strange, f"{path} must not import {strange}"


def rooms_imported(names):
    for name in names:
        parts = name.split(".")
        if parts[:2] == ["cachec", "compiler"] and len(parts) > 2:
            yield parts[2]


@in_the_tree
@pytest.mark.parametrize("path", [f for f in source_files(ROOT) if f.parts[0] == "compiler"] if IN_THE_TREE else [], ids=str)
def test_no_import_of_the_compiler_runs_upwards(path):
    if len(path.parts) == 2 and path.stem == "__init__":
        return
    room = path.parts[1].removesuffix(".py")
    names = imported_modules(ast.walk(ast.parse((ROOT / path).read_text())))
    above = {other for other in rooms_imported(names) if other != room and FLOOR[other] >= FLOOR[room]}
    assert not above, f"{path} must not import {above}"


@in_the_tree
def test_the_root_imports_only_the_runtime_at_import_time():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert set(imported_layers(imported_modules(tree.body))) == {"runtime"}


@pytest.mark.parametrize("source", ["import passes", "from runtime.program import Program"])
def test_the_layer_check_sees_bare_imports(source):
    (name, *_) = imported_modules(ast.walk(ast.parse(source)))
    assert name.split(".")[0] in LAYERS


def test_the_layer_check_sees_imports_inside_functions():
    tree = ast.parse("def f():\n    from cachec.compiler import capture\n")
    assert set(imported_layers(imported_modules(ast.walk(tree)))) == {"compiler"}


@pytest.mark.parametrize("module", ["cachec", "cachec.runtime.session", "cachec.engines"])
def test_import_is_light(module):
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


WITHOUT_TORCH = (  # what runs bundles, and what calibrates on built engines
    "cachec.runtime.inspect",
    "cachec.compiler.commands.run",
    "cachec.compiler.commands.calibrate",
    "cachec.compiler.commands.add_level",
    "cachec.compiler.calibration.engine_evaluator",
    "cachec.compiler.methods.gram",
    "cachec.compiler.planning.levels",
)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_it_imports_where_there_is_no_torch(module):
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@in_the_tree
def test_no_product_file_names_the_toy():
    assert [str(f) for f in source_files(ROOT) if "toy" in (ROOT / f).read_text().lower()] == []


@in_the_tree
def test_every_package_is_packaged():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [".".join(["cachec", *f.parent.parts]) for f in source_files(ROOT) if f.name == "__init__.py"]
    assert sorted(listed) == sorted(found)


@in_the_tree
def test_every_folder_with_modules_is_a_package():
    folders = {f.parent for f in source_files(ROOT)}
    assert [str(f) for f in folders if not (ROOT / f / "__init__.py").is_file()] == []


def most_lines(path):
    if path.as_posix() == "compiler/pipeline.py":
        return 200  # the story
    return 600 if path.parts[0] in ("tests", "bench") else 400


@in_the_tree
def test_files_are_short():
    sizes = {path: len((ROOT / path).read_text().splitlines()) for path in source_files(ROOT, without=())}
    assert {str(path): size for path, size in sizes.items() if size > most_lines(path)} == {}


def function_sizes():
    for path in source_files(ROOT, without=("tests", "bench", "examples")):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path}:{node.lineno} {node.name}", function_size(node)


def function_size(node):
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    left_out = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return node.end_lineno - node.lineno + 1 - left_out


@in_the_tree
def test_functions_are_short():
    sizes = dict(function_sizes())
    assert {name: size for name, size in sizes.items() if size > 80} == {}
    assert sum(size <= 30 for size in sizes.values()) >= 0.9 * len(sizes)


@in_the_tree
def test_no_file_is_called_utils():
    assert [str(f) for f in source_files(ROOT, without=()) if f.stem == "utils"] == []


@pytest.mark.filterwarnings("ignore::Warning:diffusers", "ignore::Warning:transformers")
@pytest.mark.parametrize("name", module_names())
def test_every_module_imports_and_says_what_it_is(name):
    try:
        module = importlib.import_module(name)
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert module.__doc__, f"{name} has no docstring"


UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADS = ("torch.load", "numpy.load")  # called by these names, so that what they are told is seen


def unpickling(tree):
    """Places of a module that could unpickle: imports of what does, and loads that do not say that they must not."""
    names = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"line {node.lineno}: {name}" for name in imported_modules([node]) if name.split(".")[0] in UNPICKLERS)
            yield from (f"line {node.lineno}: {name}" for name in imported_modules([node]) if name in LOADS)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        of, _, rest = ast.unparse(node.func).partition(".")
        name = f"{names.get(of, of)}.{rest}"
        said = {one.arg: getattr(one.value, "value", None) for one in node.keywords}
        if name == "torch.load" and said.get("weights_only") is not True:
            yield f"line {node.lineno}: {name}"
        if (name == "numpy.load" and said.get("allow_pickle", False) is not False) or rest.endswith("read_pickle"):
            yield f"line {node.lineno}: {name}"


@in_the_tree
def test_no_module_unpickles():
    found = {str(file): list(unpickling(ast.parse((ROOT / file).read_text(encoding="utf-8")))) for file in source_files(ROOT)}
    assert {file: places for file, places in found.items() if places} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from cloudpickle import loads", "def f():\n    import joblib.numpy_pickle", "from torch import load",
     "import torch\ntorch.load(x)", "import torch as t\nt.load(x, weights_only=False)",
     "import torch\ntorch.load(x, weights_only=y)", "import numpy as np\nnp.load(x, allow_pickle=True)",
     "import numpy as np\nnp.load(x, allow_pickle=y)"],
)  # fmt: skip
def test_the_check_sees_what_unpickles(source):
    assert len(list(unpickling(ast.parse(source)))) >= 1


@pytest.mark.parametrize("source", ["import torch\ntorch.load(x, weights_only=True)", "import numpy as np\nnp.load(x)"])
def test_the_check_lets_pass_what_does_not(source):
    assert list(unpickling(ast.parse(source))) == []
