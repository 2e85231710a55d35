"""Distilled models: fewer steps, and forecasts between those: a part of ``bench.quality``.

Which students there are of a model is looked up: pipelines of ``cachec-models`` and in ``WORK/MODEL/students`` that say so
(``distilled.json``). DisCa's predictors are those that ship, and files in ``WORK/MODEL/predictors``; nothing of either is
trained here, and the command that makes what is not there stands in the row. LESA for few steps is trained, in minutes.

Every row has two references: the student's own run with all steps (what forecasts cost), and its teacher's (what it all costs).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.quality_methods import OURS, make_method, plan, trained
from bench.quality_setting import AbsentError, Rows, Setting, open_model, open_setting, usual_settings
from bench.quality_tables import MEASURES, Found, cells, compared, table
from cachec.compiler.calibration.evaluator import Evaluator
from cachec.compiler.calibration.graph_evaluator import GraphEvaluator
from cachec.compiler.graphs.flops import run_flops
from cachec.compiler.graphs.prepare import prepare, with_blocks
from cachec.compiler.methods import get_method
from cachec.compiler.methods.base import BlockMethod
from cachec.compiler.methods.disca import LISTS
from cachec.compiler.methods.parameters import PRETRAINED, WEIGHTS, Parameters, load_predictor
from cachec.compiler.models import find_model, outline_model
from cachec.compiler.models.base import LoadedModel, ModelSpec
from cachec.compiler.models.distilled import distilled_facts
from cachec.compiler.models.distribution import installed_models, predictor_folders
from cachec.compiler.planning.goals import Goal
from cachec.compiler.tables.lower import lower_predictor, lower_uncached
from cachec.compiler.tables.schedule import Schedule
from cachec.runtime.abi import COMPUTE, FORECAST
from cachec.runtime.program import Program

DISTILLED, COSTS = "distilled", "costs"  # parts
FEWER = (20, 10, 8, 4)
TRAINING_FREE = ("reuse", "taylor:1", "taylor:2")
LARGE = "hunyuan-video"  # whose FLOPs are counted, too
KEPT = ("psnr", "ssim", "latent")
STEPS = 8  # of the students that the page asks for
RESTRICTS: Mapping[str, tuple[float, ...]] = {"tiny-qwen": (0.2,), "tiny-hunyuan": (0.2, 1.0)}
DISTILLING: Mapping[str, str] = {  # what their students are made with
    "tiny-qwen": "--updates 800 --batch 8 --rate 5e-5", "tiny-hunyuan": "--updates 500 --batch 8 --rate 2e-5",
}  # fmt: skip
MAIN = 0.2  # forecasts are measured on students of this
BUDGETS = (4, 3)  # computed steps of a student's, DisCa's list where there is one
LESA_ROUNDS = "30"  # of each phase: with so few steps to forecast it has stopped by then
DISCAS: Mapping[str, str] = {  # rows of DisCa, and what they are trained with
    "disca": "--set updates=500 --set adversarial=700",
    "disca, squared error alone": "--set updates=1200 --set adversarial=0",
    "disca, fusion without blocks": "--set depth=0 --set updates=500 --set adversarial=700",
}  # fmt: skip


def students_of(model: LoadedModel, work: Path) -> list[tuple[ModelSpec, Mapping[str, Any]]]:
    """What was distilled of a model, and how, fewest steps first."""
    places = [*(path for _, path in installed_models()), *sorted((work / "students").glob("*"))]
    found = [(path, facts) for path in places if (facts := distilled_facts(path)) is not None]
    own = [(find_model(str(path)), facts) for path, facts in found if facts.get("teacher_sha256") == model.weights_hash]
    return sorted(own, key=lambda one: (int(one[1]["steps"]), float(one[1]["restrict"]), one[0].name))


def bench_distilled(rows: Rows, setting: Setting) -> None:
    """The model with fewer steps; its students with all of theirs, and with forecasts between."""
    students = students_of(setting.model, setting.work)
    for restrict in RESTRICTS.get(setting.name, ()):
        rows.drop(DISTILLED, STEPS, "a student", f"R = {restrict:g}")
        if not any(float(facts["restrict"]) == restrict for _, facts in students):
            rows.measure(DISTILLED, STEPS, "a student", f"R = {restrict:g}", lambda r=restrict: _no_student(setting, r))
    if not students:
        return
    for steps in (*FEWER, *BUDGETS[1:]):
        rows.measure(DISTILLED, steps, "the model itself", setting.name, lambda n=steps: setting.measure(_plain(setting, n)))
    for spec, facts in students:
        with rows.guarding(f"student {spec.name}"):
            _bench_student(rows, setting, spec, float(facts["restrict"]))


def _bench_student(rows: Rows, teacher: Setting, spec: ModelSpec, restrict: float) -> None:
    """Rows of one student."""
    model, settings = open_model(spec)
    student = open_setting(model, settings, teacher.work / "of-students" / spec.name, teacher.extent, teacher.device)
    label = f"{spec.name} (R = {restrict:g})"
    for steps in sorted({*FEWER, *BUDGETS, settings.steps}, reverse=True):
        rows.measure(DISTILLED, steps, "all steps", label, lambda n=steps: _both(student, teacher, _plain(student, n)))
    for budget in BUDGETS if restrict == MAIN else ():
        _bench_budget(rows, student, teacher, label, budget)


def _schedule(steps: int, budget: int) -> Schedule:
    """DisCa's list, where there is one for so many; else steps as even as whole numbers allow."""
    listed = LISTS.get((steps, budget))
    return Schedule(steps, tuple(round(i * steps / budget) for i in range(budget)) if listed is None else listed)


def _bench_budget(rows: Rows, student: Setting, teacher: Setting, label: str, budget: int) -> None:
    """Forecasts between so many of the student's steps: all on the same, gram, reuse and Taylor on steps of their own, too."""
    schedule = _schedule(student.num_steps, budget)

    def measure(name: str, make: Callable[[], dict[str, Any]]) -> None:
        rows.measure(DISTILLED, budget, name, label, make)

    def linear(name: str, goal: Goal) -> dict[str, Any]:
        return _both(student, teacher, plan(student, make_method(student, name), goal))

    for name in TRAINING_FREE:
        measure(name, lambda n=name: linear(n, Goal(schedule=schedule)))
        measure(f"{name}, searched", lambda n=name: linear(n, Goal(budget=budget)))
    for name in ("gram", "gram, by pictures"):
        measure(name, lambda n=name: linear(n, Goal(budget=budget)))
    predictors = dict(disca_predictors(student))
    for name in DISCAS if len(RESTRICTS.get(teacher.name, ())) > 1 else ("disca",):  # what its parts are worth: on one model
        measure(name, lambda n=name: _disca_row(student, teacher, schedule, n, predictors))
        rows.measure(COSTS, STEPS, name, label, lambda n=name: forecast_shares(student, _given(student, n, predictors)))
    measure("lesa", lambda: _both(student, teacher, _lesa(student, schedule)))


def _disca_row(
    student: Setting, teacher: Setting, schedule: Schedule, name: str, predictors: Mapping[str, Parameters]
) -> dict[str, Any]:
    evaluator = _evaluator(student, _given(student, name, predictors))
    return _both(student, teacher, _blocks_program(student, schedule), evaluator)


def _given(student: Setting, name: str, predictors: Mapping[str, Parameters]) -> Parameters:
    """The predictor of a row. Raises ``AbsentError``: there is none."""
    if name not in predictors:
        file = student.work.parents[1] / "predictors" / f"{name.replace(',', '').replace(' ', '-')}.safetensors"
        raise AbsentError(f"not trained yet: `{_training(student.model.spec.source, name)} -o {file}`")
    return predictors[name]


def _no_student(setting: Setting, restrict: float) -> dict[str, Any]:
    out = setting.work / "students" / f"{setting.name}-distilled-{restrict:g}"
    raise AbsentError(f"not distilled yet: `{_distilling(setting.name, restrict)} -o {out}`")


def _distilling(model: str, restrict: float) -> str:
    return f"cachec distill {model} --steps {STEPS} --restrict {restrict:g} {DISTILLING[model]}"


def _training(student: str, name: str) -> str:
    return f"cachec train {student} --method disca --interval 2 {DISCAS[name]}"


def _plain(setting: Setting, steps: int) -> Program:
    sampling = setting.sampling(steps)
    return lower_uncached(setting.key(sampling), sampling)


def _both(student: Setting, teacher: Setting, program: Program, evaluator: Evaluator | None = None) -> dict[str, Any]:
    """A row against the teacher's run, and against the student's own (``own_psnr`` and so on)."""
    latents = student.play(program, evaluator)
    pictures = student.decode(latents)
    own = {f"own_{key}": value for key, value in student.compare(latents, pictures).items()}
    steps = [int(step) for step in program.compute_steps]
    return {"computed": len(steps), "of": program.num_steps, "steps": steps, **teacher.compare(latents, pictures), **own}


def _lesa(student: Setting, schedule: Schedule) -> Program:
    method = get_method("lesa").with_options({"max_rounds": "1" if student.extent.brief else LESA_ROUNDS})
    return plan(student, method, Goal(schedule=schedule), trained(student, method, schedule, "lesa"))


def disca_predictors(student: Setting) -> Iterator[tuple[str, Parameters]]:
    """Predictors for a student: that which ships, and files that are of its weights, named by what they leave out."""
    for folder in (*predictor_folders(), PRETRAINED, student.work.parents[1] / "predictors"):
        for path in sorted(folder.glob("disca*.safetensors")):
            one = load_predictor(path)
            if one.facts.get(WEIGHTS) == student.model.weights_hash:
                yield disca_name(json.loads(one.facts.get("options", "{}"))), one


def disca_name(options: Mapping[str, Any]) -> str:
    """What a predictor's options leave out."""
    if options.get("depth", 2) == 0:
        return "disca, fusion without blocks"
    return "disca, squared error alone" if options.get("adversarial", 1) == 0 else "disca"


def _evaluator(student: Setting, parameters: Parameters) -> GraphEvaluator:
    method = get_method("disca").with_options({})
    assert isinstance(method, BlockMethod)
    blocks = with_blocks(student.model, student.settings, method.blocks(student.model, parameters))
    split = prepare(student.model, student.settings)
    return GraphEvaluator(split, student.model.io, blocks, device=str(student.device))


def _blocks_program(student: Setting, schedule: Schedule) -> Program:
    own = student.calibration.sampling
    return lower_predictor(schedule, 1, feeds_back=False, key=student.key(own), sampling=own)


def forecast_shares(student: Setting, parameters: Parameters) -> dict[str, Any]:
    """A forecast's FLOPs over a computed step's: of the small model's own graphs, and of the large one's, without weights."""
    method = get_method("disca").with_options({"depth": str(json.loads(parameters.facts.get("options", "{}")).get("depth", 2))})
    assert isinstance(method, BlockMethod)
    large = outline_model(LARGE)
    small = with_blocks(student.model, student.settings, method.blocks(student.model, parameters))
    whole = with_blocks(large, usual_settings(large.spec), method.outlined(large))
    shares = {}
    for name, graphs in (("small", small), ("large", whole)):
        shares[name] = run_flops(graphs.modules[FORECAST]) / run_flops(graphs.modules[COMPUTE])
    return {"shares": shares, "large": LARGE}


def distilled_section(found: Found) -> str:
    """Tables of what there is; sentences on what there is not."""
    rows = found.of_part(DISTILLED)
    if not rows:
        if found.name not in RESTRICTS:
            return "No student is made of this model.\n"
        return f"Not measured yet: `cachec distill {found.name} --steps {STEPS}` makes a student.\n{_lacking(found)}"
    base = [(budget, row) for budget, name, _, row in rows if name == "the model itself"]
    lines = [["the model itself", str(budget), *cells(row), ""] for budget, row in base]
    for label in dict.fromkeys(label for _, name, label, _ in rows if name != "the model itself"):
        some = [one for one in rows if one[2] == label]
        lines += [[f"{label}: {name}", f"{row['computed']} of {row['of']}", *cells(row), _own(row)] for _, name, _, row in some]
    header = [
        "row",
        "computed",
        "PSNR dB",
        "p5",
        "worst",
        "SSIM",
        "latent error",
        "its p95",
        "PSNR against the student's own run",
    ]
    told = "Against the 50-step run of the model that was distilled.\n\n"
    return told + table(header, lines) + "\n\n" + _made_with(found) + _equal_cost(found) + _costs(found) + _lacking(found)


def _made_with(found: Found) -> str:
    """The commands that make students and predictors of the rows that there are."""
    rows = {name for _, name, _, _ in found.of_part(DISTILLED)}
    students = [f"    {_distilling(found.name, restrict)} -o STUDENT" for restrict in RESTRICTS[found.name]]
    predictors = [f"    {_training('STUDENT', name)} -o PREDICTOR.safetensors" for name in DISCAS if name in rows]
    return "Students, and DisCa's predictors on the first of them, are made by:\n\n" + "\n".join(students + predictors) + "\n\n"


def _own(row: Mapping[str, Any]) -> str:
    own = {key: row[f"own_{key}"] for key in KEPT}
    return "equal" if max(own["latent"]) == 0 else cells(own)[0]


def _equal_cost(found: Found) -> str:
    """Ours and DisCa beside the best of all others at as many computed steps of a student."""
    lines = []
    for label, budget in dict.fromkeys((label, budget) for budget, _, label, _ in found.of_part(DISTILLED)):
        rows = [(name, f"{row['computed']} of {row['of']}", row) for name, own, row in found.of(DISTILLED, budget)
                if own == label and "of" in row]  # fmt: skip
        for name, _, row in rows:
            others = [one for one in rows if one[0] != name and not (name in OURS and one[0] in OURS)]
            if name in (*OURS, "disca") and others:
                lines += [[label, str(budget), name, *compared(row, others, measure)] for measure in MEASURES]
    if not lines:
        return ""
    header = ["student", "K", "row", "measure", "best other by it", "its value", "this row", "difference", ""]
    told = "gram and DisCa beside the best other row of as many computed steps, against the teacher's run, paired:\n\n"
    return told + table(header, lines) + "\n\n"


def _costs(found: Found) -> str:
    lines = [
        f"- {label}, {name}: a forecast has {row['shares']['small']:.0%} of a computed step's FLOPs on this model, and "
        f"{row['shares']['large']:.1%} on {row['large']}; both counted in the graphs."
        for _, name, label, row in found.of_part(COSTS)
    ]
    return "\n".join(dict.fromkeys(lines)) + ("\n" if lines else "")


def _lacking(found: Found) -> str:
    """What is not there, with the command that makes it."""
    lines = [f"- {key}: {why}" for key, why in found.missing(DISTILLED)]
    return "\nWhat there is not:\n\n" + "\n".join(lines) + "\n" if lines else ""
