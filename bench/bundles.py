"""A bundle for one case and back end, and what it took: ``python -m bench.bundles CASE BACKEND WORK OUT``."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np

import cachec
from bench.cases import METHODS, Case, open_case
from bench.memory import peak_rss
from bench.timing import part_arguments, write_part
from cachec.compiler.pipeline import compile_bundle
from cachec.compiler.request import make_request
from cachec.runtime.engine import Engine
from cachec.runtime.errors import InputError

BACKENDS = ("ort", "aoti", "inductor")


def bundle_path(work: Path, case: str, backend: str) -> Path:
    return work / "bundles" / f"{case}-{backend}.cachec"


def conditions_path(work: Path, case: str) -> Path:
    """What text encoders made of the first prompt, for processes that have none."""
    return work / f"conditions-{case}.npz"


def load_engines(work: Path, case: Case, backend: str, stack: ExitStack) -> Mapping[str, Engine]:
    """The engines of a bundle that this bench made.

    Raises:
        InputError: it has not been made.
    """
    path = bundle_path(work, case.name, backend)
    if not path.is_dir():
        raise InputError(f"{path} is missing: python -m bench.speed --only bundles")
    return stack.enter_context(cachec.load(path)).engines


@click.command()
@part_arguments("name", "backend")
def main(name: str, backend: str, work: Path, out: Path, quick: bool) -> None:
    case = open_case(name, work, quick=quick)
    method, options = METHODS["hidden"]
    budget = case.budgets[-1]
    request = make_request(
        case.model.spec, method=method, options=options, steps=case.steps, budget=budget, schedule="uniform", targets=backend
    )
    path = bundle_path(work, name, backend)
    start = time.perf_counter()
    result = compile_bundle(case.model, request, path, force=True)
    seconds = time.perf_counter() - start
    conditions, noise = case.requests[0]
    np.savez(conditions_path(work, name), noise=noise.numpy(), **{key: value.numpy() for key, value in conditions.items()})
    sizes = {name: entry["bytes"] for name, entry in result.bundle.manifest.files.items()}
    write_part(out, {
        "case": name, "backend": backend, "command": f"--method {method}, {budget} of {case.steps} steps",
        "seconds": seconds, "stages": dict(result.seconds), "bytes": sum(sizes.values()), "files": sizes,
        "peak_rss": peak_rss(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
