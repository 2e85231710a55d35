"""``cachec eval`` and ``cachec report``: an evaluation from the command line, and the report that is made of it."""

import datetime
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cachec.compiler.calibration.crew import choose_crew
from cachec.compiler.calibration.prompts import default_prompts, read_prompts
from cachec.compiler.calibration.workers import Place, Recipe, at_work
from cachec.compiler.commands.messages import set_up_messages
from cachec.compiler.commands.recipes import take_threads
from cachec.compiler.evaluation.bench import Bench, BenchFacts, PromptResult, PromptTask, open_bench
from cachec.compiler.evaluation.comparisons import compared_level, parse_against
from cachec.compiler.evaluation.evaluate import Evaluation, evaluate, measure
from cachec.compiler.evaluation.page import render_page
from cachec.compiler.evaluation.plots import coefficients_of
from cachec.compiler.evaluation.words import Report, render_markdown
from cachec.compiler.models import find_model, load_model
from cachec.compiler.models.base import check_prompts
from cachec.compiler.models.lora_files import LoraFile, parse_loras
from cachec.compiler.options import WorkersWish
from cachec.engines import open_bundle
from cachec.engines.gpu import check_gpu
from cachec.runtime.bundle import Bundle, Manifest
from cachec.runtime.errors import InputError
from cachec.runtime.files import check_file, write_file
from cachec.runtime.host_memory import num_cores
from cachec.runtime.inspect import describe_bundle
from cachec.runtime.noise import check_seed
from cachec.runtime.program import Program
from cachec.runtime.work import remove_work

FORMATS = (".html", ".md", ".json")


@dataclass(frozen=True)
class BundleBench(Recipe[BenchFacts, PromptTask, PromptResult]):
    """How a worker opens a bundle and its model, to be measured beside what ``against`` names."""

    root: Path
    source: str
    against: str
    level: str | None
    target: str | None
    size: str | None = None
    steps: int | None = None
    weights: str | None = None
    loras: tuple[LoraFile, ...] = ()

    @contextmanager
    def open(self, place: Place) -> Iterator[Bench]:
        set_up_messages()
        take_threads(place)
        where: dict[str, Any] = {"device": place.device, "target": self.target, "size": self.size, "steps": self.steps}
        with open_bundle(self.root, **where, weights=self.weights, threads=place.threads) as loaded:
            model = load_model(find_model(self.source), loras=self.loras)
            with open_bench(loaded, model, against=self.against, level=self.level) as bench:
                yield bench


def evaluate_bundle(
    bundle: Path,
    *,
    file: Path | None,
    num: int,
    seed: int,
    source: str | None,
    against: str,
    level: str | None = None,
    device: str | None = None,
    target: str | None = None,
    size: str | None = None,
    steps: int | None = None,
    weights: str | None = None,
    loras: Sequence[str] = (),
    keep_pictures: int = 0,
    wish: WorkersWish = WorkersWish(),  # noqa: B008  # frozen
    work: Path | None = None,
) -> Evaluation:
    """Evaluate a bundle on the first ``num`` prompts of ``file``, or of the list that ships for its model.

    ``size`` and ``steps``: one of each that it was compiled for, by default its first. ``weights``: some that were added to it.
    ``loras``: what is fused in those that are measured, for the model beside them.

    ``wish`` says who measures them. What was measured before an interruption lies in ``work``, if that is given.

    Raises:
        InputError: there are fewer prompts than asked for, or an option cannot be used.
        MissingExtraError: a package that is wanted is not installed.
    """
    if num < 1:
        raise InputError(f"num is {num}; it must be at least 1")
    check_seed(seed)
    parse_against(against)
    files = parse_loras(loras)
    if (crew := choose_crew(wish, device, check_gpu)) is not None:
        manifest = Bundle.open(bundle).manifest.at(size, steps)
        spec, prompts = find_model(source or manifest.model["source"]), _read_prompts(manifest, file, num)
        bench = BundleBench(bundle.resolve(), spec.portable_source, against, level, target, size, steps, weights, files)
        with at_work(crew, bench) as benches:
            return measure(benches, manifest, prompts, seed=seed, against=against, work=work)
    where: dict[str, Any] = {"device": device, "target": target, "size": size, "steps": steps, "weights": weights}
    with open_bundle(bundle, **where) as loaded:
        level = compared_level(loaded, level)
        spec = find_model(source or loaded.manifest.model["source"])
        prompts = _read_prompts(loaded.manifest, file, num)
        return evaluate(
            loaded, load_model(spec, loras=files), prompts,
            seed=seed, against=against, level=level, keep_pictures=keep_pictures, work=work,
        )  # fmt: skip


def _read_prompts(manifest: Manifest, file: Path | None, num: int) -> list[str]:
    prompts = read_prompts(file) if file else default_prompts(manifest.settings["prompts"], "eval")
    check_prompts(prompts)
    if num > len(prompts):
        raise InputError(f"num is {num}, but there are only {len(prompts)} prompts: give more with --prompts")
    return list(prompts[:num])


def evaluate_to_file(
    bundle: Path, out: Path | None, *, force: bool, workers: str | None, devices: str | None, **options: Any
) -> Evaluation:
    """Evaluate a bundle (``options`` as for :func:`evaluate_bundle`), into the JSON file ``out`` if one is given.

    What was measured lies beside that file until it is done.

    Raises:
        OutputError: ``out`` exists and ``force`` is not given, or cannot be written.
    """
    wish, work = WorkersWish(workers, devices), None
    if out is not None:
        check_file(out, force=force)
        work = out.with_name(out.name + ".parts")
    evaluation = evaluate_bundle(bundle, wish=wish, work=work, **options)
    if out is not None and work is not None:
        write_file(out, json.dumps(evaluation.to_json(), indent=1).encode())
        remove_work(work)
    return evaluation


def report_bundle(bundle: Path, out: Path, *, pictures: int, force: bool, **options: Any) -> Report:
    """Evaluate a bundle (``options`` as for :func:`evaluate_bundle`) and write the report, in the format of ``out``'s name.

    Raises:
        InputError: ``out`` is no ``.html``, ``.md`` or ``.json`` file, or ``pictures`` is negative.
        OutputError: ``out`` exists and ``force`` is not given, or cannot be written.
    """
    if out.suffix.lower() not in FORMATS:
        raise InputError(f"{out} has no ending that a report can have: name it .html, .md or .json")
    if pictures < 0:
        raise InputError(f"pictures is {pictures}; it must be at least 0")
    check_file(out, force=force)
    evaluation = evaluate_bundle(bundle, keep_pictures=pictures, **options)
    name = bundle.resolve().name
    report = Report(name, evaluation, describe_bundle(Bundle.open(bundle)), environment(evaluation.setting["backend"]))
    write_file(out, render_report(report, out.suffix.lower()).encode())
    return report


def render_report(report: Report, suffix: str) -> str:
    """The report as ``.html``, ``.md`` or ``.json``."""
    if suffix == ".html":
        return render_page(report)
    if suffix == ".md":
        return render_markdown(report)
    return json.dumps(report_json(report), indent=1)


def report_json(report: Report) -> dict[str, Any]:
    """The evaluation, and by row: the schedule, the coefficients, the error by step."""
    errors = {name: vars(curve) for name, curve in report.evaluation.errors.items()}
    return {
        "bundle": report.name,
        **report.evaluation.to_json(),
        "programs": {name: _program_json(program) for name, program in report.evaluation.programs.items()},
        "errors_by_step": errors,
        "facts": [list(fact) for fact in report.facts],
        "environment": dict(report.environment),
    }


def _program_json(program: Program) -> dict[str, Any]:
    found = coefficients_of(program)
    groups = [[[None if np.isnan(v) else float(f"{v:.7g}") for v in row] for row in group] for group in found.values]
    return {
        "cut": program.cut,
        "steps": program.num_steps,
        "computed": list(program.compute_steps),
        "sigmas": [float(f"{sigma:.7g}") for sigma in program.sigmas],
        "coefficients": {"steps": list(found.steps), "of_steps": list(found.sources), "groups": groups},
    }


def environment(backend: str) -> list[tuple[str, str]]:
    """The machine and the versions that the seconds were measured with."""
    packages = ["cachec", "torch", "numpy", "diffusers", *(["onnxruntime"] if backend == "ort" else [])]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages if _is_installed(name)]
    return [
        ("measured", datetime.datetime.now(tz=datetime.UTC).date().isoformat()),
        ("processor", f"{_processor()}, {num_cores()} cores usable"),
        ("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        ("versions", ", ".join(versions)),
    ]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
