"""Do the tests notice wrong code? ``python -m tests.mutate``; not part of the suite: it runs test files for a long time.

Single-line mutations of ``runtime/``, ``passes/`` and ``compiler/tables/``, drawn by a seed over all comparisons, constants,
operators and statements, are made one at a time in a copy of the tree. Each is judged by the module's own test file
(``tests/<path>/test_<module>.py``, or what ``SERVED`` says) and then, if that passes, by the toy's end-to-end tests. Mutations
that change nothing a caller could see are listed in ``mutate_equivalent.txt``, with the reason. On 2026-11-26 all of the other
57 were caught, by the module's own file already.
"""

import argparse
import ast
import concurrent.futures
import copy
import hashlib
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("runtime", "passes", "compiler/tables")
END_TO_END = "tests/test_toy.py"
SERVED = {  # modules without a test file of their name, by the file that tests them
    "tests/passes/test_passes.py": ("passes/__init__",),
    "tests/passes/test_run.py": ("passes/base",),
}
EQUIVALENT = Path(__file__).parent / "mutate_equivalent.txt"
SEED, COUNT = 12, 60
LIMIT = 600  # seconds; a mutation that makes the tests hang is noticed
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Mutation:
    """A line of a file, before and after."""

    file: str
    line: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before.strip()}  =>  {self.after.strip()}"

    @property
    def name(self) -> str:
        """Without the number of the line, which moves."""
        return f"{self.file}: {self.before.strip()} => {self.after.strip()}"


def mutated(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may become."""
    made = copy.deepcopy(node)
    match node:
        case ast.Compare(ops=[op, *_]) if type(op) in COMPARISONS:
            made.ops[0] = COMPARISONS[type(op)]()
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            made.op = OPERATORS[type(op)]()
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            made = operand
        case ast.Constant(value=bool(value)):
            made.value = not value
        case ast.Constant(value=int(value) | float(value)):
            made.value = value + 1
        case ast.Constant(value=str(value)) if value:
            made.value = value + "_"
        case ast.Raise() | ast.Expr() | ast.Delete():
            made = ast.Pass()
        case ast.Continue():
            made = ast.Break()
        case ast.Return(value=value) if value is not None and ast.unparse(value) != "None":
            made.value = ast.Constant(None)
        case ast.If(test=test):
            made = ast.UnaryOp(ast.Not(), test)
        case _:
            return
    yield made


def unseen(tree: ast.Module) -> set[ast.AST]:
    """Nodes that say something to people and type checkers only: docstrings, messages, annotations, decorators."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        inside: list[ast.AST] = []
        match node:
            case ast.Expr(value=ast.Constant()):
                inside = [node]
            case ast.JoinedStr():
                inside = [node]
            case ast.Raise(exc=ast.Call(args=arguments)):
                inside = list(arguments)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"))):
                inside = [node, *(parent for parent in ast.walk(tree) if getattr(parent, "value", None) is node)]
            case ast.Import() | ast.ImportFrom():
                inside = [node]
            case ast.AnnAssign(annotation=annotation):
                inside = [annotation]
            case ast.FunctionDef(returns=returns, args=arguments, decorator_list=decorators):
                inside = [returns, *decorators, *(one.annotation for one in ast.walk(arguments) if isinstance(one, ast.arg))]
            case ast.ClassDef(decorator_list=decorators):
                inside = [*decorators]
        found |= {part for one in inside if one is not None for part in ast.walk(one)}
    return found


def mutations_of(file: str, text: str) -> Iterator[Mutation]:
    tree, lines = ast.parse(text), text.splitlines()
    skipped = unseen(tree)
    for node in ast.walk(tree):
        place = node.test if isinstance(node, ast.If) else node
        if node in skipped or getattr(place, "lineno", 0) != getattr(place, "end_lineno", None):
            continue
        line = lines[place.lineno - 1].encode()
        for made in mutated(node):
            code = ast.unparse(ast.fix_missing_locations(made))
            wrapped = f"({code})" if isinstance(made, ast.expr) and not isinstance(made, ast.Constant) else code
            after = (line[: place.col_offset] + wrapped.encode() + line[place.end_col_offset :]).decode()
            if after != line.decode() and parses([*lines[: place.lineno - 1], after, *lines[place.lineno :]]):
                yield Mutation(file, place.lineno, line.decode(), after)


def parses(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def draw(seed: int, count: int, root: Path = ROOT) -> list[Mutation]:
    """Those whose hashes with the seed are least: after an edit of the tree most are drawn again."""
    files = sorted(path.relative_to(root).as_posix() for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    every = {one.name: one for file in files for one in mutations_of(file, (root / file).read_text(encoding="utf-8"))}
    ranks = {name: hashlib.sha256(f"{seed} {name}".encode()).digest() for name in every}
    return [every[name] for name in sorted(every, key=lambda name: ranks[name])[:count]]


def judges(file: str, *, own: bool) -> list[str]:
    """The test files that judge a module, the quicker first; ``own``: without the toy's, if there is another."""
    path = Path(file)
    named = Path("tests", *path.parts[:-1], f"test_{path.stem}.py")
    module = path.with_suffix("").as_posix()
    tests = [named.as_posix()] if (ROOT / named).is_file() else [test for test, served in SERVED.items() if module in served]
    return tests if tests and own else [*tests, END_TO_END]


def copy_tree(folder: Path) -> Path:
    """The tree as git knows it, importable as ``cachec``; returns the folder to import it from."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "cachec" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "cachec" / name)
    return folder


def passes(folder: Path, tests: list[str], limit: float | None) -> bool:
    """Do these tests pass in a copy, within so many seconds?"""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    try:
        done = subprocess.run(command, cwd=folder / "cachec", env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(f"{' '.join(command)} ends with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def survives(mutation: Mutation, folder: Path, tests: list[str]) -> bool:
    path = folder / "cachec" / mutation.file
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    lines[mutation.line - 1] = mutation.after + "\n"
    path.write_text("".join(lines), encoding="utf-8")
    try:
        return passes(folder, tests, LIMIT)
    finally:
        path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--only", action="append", help="mutations that say this; may be given several times")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--own", action="store_true", help="a first look, without the toy's end-to-end tests")
    parser.add_argument("--list", action="store_true", help="run nothing")
    given = parser.parse_args()
    drawn = list(enumerate(draw(given.seed, given.count), 1))
    chosen = [(number, one) for number, one in drawn if not given.only or any(text in str(one) for text in given.only)]
    if given.list:
        print(*(f"{number:3} {one}" for number, one in chosen), sep="\n")
        return
    equivalent = {line.rpartition("  # ")[0] for line in EQUIVALENT.read_text(encoding="utf-8").splitlines()}
    with tempfile.TemporaryDirectory(prefix="cachec-mutate-") as work:
        free: queue.Queue[Path] = queue.Queue()
        for index in range(given.jobs):
            free.put(copy_tree(Path(work, str(index))))
        judging = {one.file: judges(one.file, own=given.own) for _, one in chosen}
        tests = sorted({test for some in judging.values() for test in some})
        if not passes(Path(work, "0"), tests, None):
            sys.exit(f"the tests fail without any mutation: {' '.join(tests)}")

        def judge(numbered: tuple[int, Mutation]) -> str:
            number, one = numbered
            folder, start = free.get(), time.perf_counter()
            try:
                verdict = (
                    "caught"
                    if not survives(one, folder, judging[one.file])
                    else "equivalent"
                    if one.name in equivalent
                    else "SURVIVED"
                )
            finally:
                free.put(folder)
            print(f"{number:3} {verdict:10} {time.perf_counter() - start:5.1f} s  {one}", flush=True)
            return verdict

        with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
            verdicts = list(pool.map(judge, chosen))
    counted = [verdict for verdict in verdicts if verdict != "equivalent"]
    caught = counted.count("caught")
    print(f"{caught} of {len(counted)} caught ({caught / max(len(counted), 1):.0%}), {len(verdicts) - len(counted)} equivalent")


if __name__ == "__main__":
    main()
